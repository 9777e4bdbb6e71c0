"""Several processes: who we are among them."""

from __future__ import annotations

from torch import Tensor, distributed


def rank_of_world() -> tuple[int, int]:
    """Return the rank of this process and the number of all: (0, 1) without torch.distributed."""
    if is_joined():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def is_joined() -> bool:
    """Whether this process has joined a group of processes, of itself alone maybe."""
    return distributed.is_available() and distributed.is_initialized()


def add_up(values: Tensor) -> None:
    """Add values up over all ranks, in place; nothing happens on one."""
    if rank_of_world()[1] > 1:
        distributed.all_reduce(values)
