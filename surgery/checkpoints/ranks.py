"""What one of several processes does while the others wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed

from surgery.errors import CheckpointError
from surgery.ranks import rank_of_world


@contextmanager
def on_first_rank() -> Iterator[bool]:
    """Give whether this is rank 0, which works; all wait for it, and fail with it."""
    rank, world = rank_of_world()
    own: list[str | None] = [None]
    try:
        yield rank == 0
    except BaseException as error:
        own = [str(error)]
        raise
    finally:
        told = [*own]
        if world > 1:
            distributed.broadcast_object_list(told, src=0)
        if told != own and own == [None]:
            raise CheckpointError(f"rank 0 has failed: {told[0]}")
