"""A soak: lives of thousands of steps, and what grows meanwhile: benchmarks/results/soak.json.

python tests/soak.py    # `make soak`: 10,000 actions, or as many as SOAK_MINUTES (20) allow
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

import psutil  # noqa: E402 # a dependency of accelerate's
import torch  # noqa: E402
from laws import state_of  # noqa: E402
from long_life import ACTIONS, KINDS, Life  # noqa: E402
from torch._subclasses import FakeTensor  # noqa: E402

from surgery.memory import state_bytes  # noqa: E402

ACTIONS_IN_ALL = int(os.environ.get("SOAK_ACTIONS", "10000"))
MINUTES = float(os.environ.get("SOAK_MINUTES", "20"))
TURN = 25  # actions of one life before the next one's turn
RESULT = ROOT / "benchmarks" / "results" / "soak.json"


def live_bytes() -> int:
    """Return the bytes of all tensors that Python can reach."""
    gc.collect()
    found: dict[int, int] = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and not issubclass(type(each), FakeTensor):
            try:
                storage = each.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
            except (NotImplementedError, RuntimeError):  # of tensors without memory
                continue
    return sum(found.values())


class _Malloc(ctypes.Structure):
    """`struct mallinfo2` of glibc (man mallinfo)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        ]
    ]


def malloc_bytes() -> int | None:
    """Return the bytes that malloc has given away and not got back; None without glibc 2.33.

    Resident memory that grows while these stand still is fragments, not a leak.
    """
    known = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if known is None:
        return None
    known.restype = _Malloc
    found = known()
    return found.uordblks + found.hblkhd


def sample(lives: dict[str, Life], done: int) -> dict[str, Any]:
    return {
        "actions": done,
        "resident_bytes": psutil.Process().memory_info().rss,
        "live_tensor_bytes": live_bytes(),
        "malloc_bytes": malloc_bytes(),
        "python_objects": len(gc.get_objects()),
        "optimizer_state_bytes": sum(state_bytes(life.optimizer) for life in lives.values()),
        "captures": sum(state_of(life.model).dispatch.captures for life in lives.values()),
        "structures": len(set().union(*(life.known for life in lives.values()))),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    chance, began = random.Random(0), time.monotonic()
    lives = {kind: Life(kind) for kind in KINDS}
    others = [name for name in ACTIONS if name != "step"]
    made = dict.fromkeys(ACTIONS, 0)
    samples: list[dict[str, Any]] = []
    done = 0
    while done < ACTIONS_IN_ALL and time.monotonic() - began < 60 * MINUTES:
        for kind, life in lives.items():
            for _ in range(TURN):
                name = "step" if chance.random() < 0.5 else chance.choice(others)
                drawn: list[int] = []

                def below(count: int, drawn: list[int] = drawn) -> int:
                    drawn.append(chance.randrange(count))
                    return drawn[-1]

                try:
                    ACTIONS[name](life, below)
                    life.check()
                except BaseException as error:
                    error.add_note(f"action {done} of the soak, {kind}: {name}{tuple(drawn)}")
                    raise
                made[name] += 1
                done += 1
            life.check_gone()
        samples.append(sample(lives, done))
        print(json.dumps(samples[-1]), flush=True)
    warm = samples[len(samples) // 3]  # every structure has been met by then
    grown = {key: samples[-1][key] - warm[key] for key in warm if warm[key] is not None}
    result = {
        "actions": done,
        "made": made,
        "steps": made["step"],
        "minutes": round((time.monotonic() - began) / 60, 1),
        "peak_resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "grown_in_the_last_two_thirds": grown,
        "samples": samples,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "samples"}, indent=1))
    for life in lives.values():
        life.end()


if __name__ == "__main__":
    main()
