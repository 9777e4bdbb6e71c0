"""Several processes: who we are among them."""

from __future__ import annotations

from torch import distributed


def rank_of_world() -> tuple[int, int]:
    """Return the rank of this process and the number of all: (0, 1) without torch.distributed."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
