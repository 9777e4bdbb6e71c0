"""What each pass sends between processes in a step: bytes of gradients and of weights.

    python -m benchmarks.traffic [words of the parts]

Two processes (gloo), SmolLM2-135M with 8 blocks, each on half of the batch, under
DistributedDataParallel and FSDP2. Every collective of backward and of the optimizer's step is
counted where it enters torch.distributed, a mean over steps 2 to 5 (the first makes the optimizer's
state; MISA's and RSO's round ends once). FSDP2's gathering of weights is that of backward alone.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import logging

import passes
import surgery
from benchmarks.common import run_parts
from examples.real import kjv, smollm2, token_rows

LAYERS, LENGTH, STEPS = 8, 64, 5
METHODS: dict[str, Any] = {
    "AdamW": None,
    "misa, budget 0.1": passes.Misa(budget=0.1, period=3),
    "rso, rank 64": passes.Rso(rank=64, period=3),
    "galore, rank 64": passes.Galore(rank=64, period=3),
    "velora, 64 groups": passes.Velora(groups=64),
    "mezo": passes.Mezo(),
}


class Counting(TorchDispatchMode):
    """Bytes that enter collectives, by kind: of a reduction its input, of a gather its output."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.overloadpacket.__name__
            moved = result if "gather" in name else args
            sizes = [t.nbytes for t in tree_leaves(moved) if isinstance(t, Tensor)]
            if "reduce" in name or "gather" in name:
                self.bytes["gathered" if "gather" in name else "reduced"] += max(sizes)
        return result


def count(rank: int, folder: str, method: str, wrap: str) -> None:
    """Train one method on one of two processes; the first writes what was counted."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model: Any
    model, tokenizer = smollm2(LAYERS)
    model.config.use_cache = False
    rows = token_rows(kjv(), tokenizer, LENGTH, 2 * STEPS)
    spec = METHODS[method]
    if spec is not None:
        surgery.apply(model, spec)
    outer: Any = model
    if wrap == "DDP":
        outer = DistributedDataParallel(model, find_unused_parameters=spec is not None)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    kind = torch.optim.SGD if method == "mezo" else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=1e-5)
    counting = Counting()
    for step, batch in enumerate(rows.split(2)):
        ids = batch.chunk(2)[rank]
        loss = outer(input_ids=ids, labels=ids).loss
        with counting:
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            counting.bytes.clear()
    if rank == 0:
        torch.save({k: v / (STEPS - 1) for k, v in counting.bytes.items()}, Path(folder) / "found")
    distributed.destroy_process_group()


def compare(wrap: str) -> dict[str, Any]:
    """Return megabytes of each method under one wrap."""
    rows: dict[str, Any] = {}
    for method in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            spawn(count, (folder, method, wrap), nprocs=2)
            found = torch.load(Path(folder) / "found")
        rows[method] = {
            f"{kind}_megabytes": round(found.get(kind, 0) / 1e6, 6)
            for kind in ("reduced", "gathered")
        }
        dense = rows["AdamW"]["reduced_megabytes"]
        rows[method]["reduced_over_adamw"] = round(rows[method]["reduced_megabytes"] / dense, 6)
        print(wrap, method, rows[method], flush=True)
    return {"layers": LAYERS, "tokens": LENGTH, "rows": rows}


PARTS = {wrap: partial(compare, wrap) for wrap in ("DDP", "FSDP2")}


def main(parts: Sequence[str]) -> None:
    """Run the parts whose names contain one of the words given (default: all)."""
    run_parts("traffic", PARTS, parts)


if __name__ == "__main__":
    main(sys.argv[1:])
