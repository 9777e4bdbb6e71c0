"""Several processes: who we are among them, and whether the wrap around the model will do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from surgery.errors import ModelError


class Trained(Protocol):
    """A coordinate: whether it is being trained now."""

    active: bool


def rank_of_world() -> tuple[int, int]:
    """Return the rank of this process and the number of all: (0, 1) without torch.distributed."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def check_wrapping(pieces: Iterable[Trained]) -> None:
    """Raise ModelError, in a training forward, if DistributedDataParallel is around us and waits
    for gradients of what is not being trained now."""
    wrapper = DistributedDataParallel._active_ddp_module
    if wrapper is None or wrapper.find_unused_parameters:
        return
    if not all(piece.active for piece in pieces):
        raise ModelError(
            "DistributedDataParallel waits for a gradient of every weight, and only some are "
            "trained in a round. Wrap it as "
            "DistributedDataParallel(model, find_unused_parameters=True); in the HF Trainer, "
            "ddp_find_unused_parameters=True."
        )
