"""Several processes: who we are among them."""

from __future__ import annotations

from torch import Tensor, distributed


def rank_of_world() -> tuple[int, int]:
    """Return this process's rank and the number of processes, (0, 1) without torch.distributed."""
    if is_joined():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def is_joined() -> bool:
    """Whether this process has joined a group of processes, of itself alone maybe."""
    return distributed.is_available() and distributed.is_initialized()


def add_up(values: Tensor) -> None:
    """Add values up over all ranks, in place. With one rank, nothing happens."""
    if rank_of_world()[1] > 1:
        distributed.all_reduce(values)
