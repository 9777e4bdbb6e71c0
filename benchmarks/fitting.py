"""What fits: 8 B models, one row of 2,048 tokens in bfloat16, for 16, 24 and 80 GiB.

    python -m benchmarks.fitting [llama-3-8b] [qwen3-8b] [nf4]

Played on this machine from configs alone (benchmarks/configs), with an H100's allocator and times.
nf4: Llama-3-8B with its blocks in four bits under LoRA of rank 16.
"""

from __future__ import annotations

import resource
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import surgery
from benchmarks.common import adapted, run_parts
from surgery.prediction.sources import model_of
from surgery.reports.fitting import Goal, Row

CONFIGS = Path(__file__).parent / "configs"
BATCH = (1, 2048)
_GOALS: tuple[Goal, ...] = ("full", "forwards")
MEMORIES = ("16GiB", "24GiB", "80GiB")


def fitted(model: Any, goals: tuple[Goal, ...]) -> dict[str, Any]:
    """Return every composition's peak and time, and what is recommended for each memory."""
    began = time.monotonic()
    found = [
        surgery.fit(model, BATCH, "80GiB", device="h100", goal=goal, told=_told) for goal in goals
    ]
    rows = [row for each in found for row in each.rows]
    within = {memory: [each.within(memory) for each in found] for memory in MEMORIES}
    longest = {
        memory: {row.title: row.length for each in fits for row in each.rows}
        for memory, fits in within.items()
    }
    eager = rows[0].milliseconds
    assert eager is not None
    return {
        "rows": {
            row.title: {
                "peak_gib": row.peak / (1 << 30),
                "time_over_eager": row.milliseconds / eager,
                "quality": row.quality,
                "longest": {memory: lengths[row.title] for memory, lengths in longest.items()},
            }
            for row in rows
            if row.peak is not None and row.milliseconds is not None
        },
        "best": {
            memory: [each.best.title if each.best is not None else None for each in fits]
            for memory, fits in within.items()
        },
        "minutes": round((time.monotonic() - began) / 60, 1),
        "peak_resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20),
    }


def _told(row: Row) -> None:
    print(row.title, row.peak, row.note, flush=True)


def main() -> None:
    torch.set_num_threads(1)
    parts = {each.name: partial(fitted, str(each), _GOALS) for each in sorted(CONFIGS.iterdir())}
    few = adapted(model_of(CONFIGS / "llama-3-8b"), 16, four_bits=True)
    parts["nf4"] = partial(fitted, few, ("adapter",))
    run_parts("fitting", parts, sys.argv[1:], batch=list(BATCH), device="h100")


if __name__ == "__main__":
    main()
