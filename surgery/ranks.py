"""Several processes: who we are among them, and what only one of them does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, distributed


def rank_of_world() -> tuple[int, int]:
    """Return the rank of this process and the number of all: (0, 1) without torch.distributed."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@contextmanager
def on_first_rank() -> Iterator[bool]:
    """Give whether this is rank 0, which works; all wait for it at the end, of an error too."""
    rank, world = rank_of_world()
    try:
        yield rank == 0
    finally:
        if world > 1:
            distributed.barrier()


def add_up(values: Tensor) -> None:
    """Add values up over all ranks, in place; nothing happens on one."""
    if rank_of_world()[1] > 1:
        distributed.all_reduce(values)
