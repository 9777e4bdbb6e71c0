"""Law 12: on two processes, DDP and FSDP2 give the run of one process on the joined batch."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from surgery.api import apply
from surgery.compat.world import shard
from surgery.testing.case import Case, LawError, close, equal, own
from surgery.testing.laws import model_loss
from surgery.weights import shards
from surgery.weights.targets import blocks

WRAPS = ("DDP", "FSDP2")
STEPS = 5


def two_ranks(case: Case | Sequence[Case], wraps: Sequence[str] = WRAPS) -> None:
    """Run a case on two processes (gloo), each on half of the batch; raise LawError if it fails.

    The pass, the model and the inputs of a case must pickle, so they are functions and classes of
    modules. Several cases share the processes.
    """
    cases = (case,) if isinstance(case, Case) else tuple(case)
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        said = context.Queue()
        ranks = [
            context.Process(target=_rank, args=(rank, folder, cases, tuple(wraps), said))
            for rank in range(2)
        ]
        for each in ranks:
            each.start()
        found = [said.get(timeout=600) for _ in ranks]
        for each in ranks:
            each.join()
    broken = [text for text in found if text]
    if broken:
        raise LawError(broken[0])


def _rank(rank: int, folder: str, cases: Sequence[Case], wraps: Sequence[str], said: Any) -> None:
    try:
        torch.set_num_threads(1)
        store = f"file://{Path(folder) / 'store'}"
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        for case in cases:
            of = f"{case.spec}, " if len(cases) > 1 else ""
            for wrap in wraps:
                _compare(rank, case, wrap, of)
        distributed.destroy_process_group()
        said.put("")
    except BaseException as error:
        said.put(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")


def _compare(rank: int, case: Case, wrap: str, of: str) -> None:
    torch.compiler.reset()
    both, alone = (apply(case.model().double(), case.passes(period=2)) for _ in range(2))
    outer = _wrapped(both, wrap)
    for model, forward, halves in ((both, outer, True), (alone, alone, False)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
        for seed in range(STEPS):
            inputs = case.inputs(seed=seed, rows=4)
            if halves:
                inputs = {key: value.chunk(2)[rank] for key, value in inputs.items()}
            model_loss(forward, inputs).backward()
            optimizer.step()
            optimizer.zero_grad()
    loose = 1e-2 if case.average else 1e-7
    for name, parameter in own(alone).items():
        mine = shards.whole(own(both)[name].detach())
        others = [torch.empty_like(mine) for _ in range(2)]
        distributed.all_gather(others, mine.contiguous())
        equal(others[0], others[1], f"{of}{wrap}: {name} on both ranks")
        close(mine, parameter.detach(), f"{of}{wrap}: {name}", rtol=loose, atol=0.01 * loose)


def _wrapped(model: nn.Module, wrap: str) -> nn.Module:
    if wrap == "DDP":
        return DistributedDataParallel(model, find_unused_parameters=True)
    shard(model, blocks(model), init_device_mesh("cpu", (2,)))
    return model
