"""`torchrun ... surgery train`: the processes of a run, and what is wrapped for them."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from surgery.ranks import rank_of_world
from surgery.weights.targets import blocks

WRAPS = ("ddp", "fsdp2")


def is_first() -> bool:
    """Say whether this process is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def world() -> int:
    """Return the number of processes that torchrun has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the other processes, if there are any; give the device of this one."""
    if world() == 1:
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    own = distributed.is_initialized()
    if not own:
        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # of an exit, too: they hold what has run
        raise
    finally:
        # Did a DistributedDataParallel outlive the group, torch would end the group's threads under
        # Python's lock, for which one of them may be waiting, to let a tensor go.
        gc.collect()
        if not own:
            distributed.destroy_process_group()


def wrapped(model: Any, wrap: str) -> Any:
    """Return what is called in the place of a model under surgery: itself on a single process."""
    if world() == 1:
        return model
    if wrap == "ddp":
        # Passes that sample leave candidates without gradients.
        return DistributedDataParallel(model, find_unused_parameters=True)
    kind = next(model.parameters()).device.type
    mesh = init_device_mesh(kind, (world(),))
    for name in blocks(model):
        fully_shard(model.get_submodule(name), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def agreed(number: int | None, device: torch.device) -> int | None:
    """Return the largest number that any process has, None if none has one."""
    if rank_of_world()[1] == 1:
        return number
    found = torch.tensor(number or 0, device=device)
    distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
    return int(found) or None
