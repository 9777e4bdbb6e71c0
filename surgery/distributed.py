"""Several processes: who we are among them, and whether the wrap around the model will do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from surgery import sharding
from surgery.coordinates import Piece, Site
from surgery.errors import ModelError


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


def check_wrapping(pieces: Iterable[Piece]) -> None:
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


def check_layout(model: nn.Module) -> None:
    """Raise ModelError if FSDP1 or DeepSpeed has laid out the model's parameters anew."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ModelError(
            "this model is wrapped in FullyShardedDataParallel (FSDP1), which flattens parameters "
            "together. Use FSDP2: surgery.apply(model, ...), then "
            "torch.distributed.fsdp.fully_shard(model) (accelerate: fsdp_version: 2)."
        )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
            raise ModelError(
                f"{name} belongs to DeepSpeed ZeRO, whose optimizer steps flat copies of many "
                "parameters at once, past any coordinates. Use FSDP2, "
                "torch.distributed.fsdp.fully_shard (accelerate: fsdp_version: 2), or DDP."
            )


# -- FSDP2 -----------------------------------------------------------------------------------------


def take_cut(
    first: Sequence[Piece],
    pieces: Sequence[Piece],
    table: nn.Module | None,
    twins: sharding.Twins,
) -> None:
    """Let mapped coordinates be the parameters that `fully_shard` has put into the table.

    first: the pieces that gave their names to the table's parameters. Raises ModelError if a weight
    is trained in parts.
    """
    parts = [piece for piece in pieces if piece.index is not None]
    if parts:
        raise ModelError(
            f"{parts[0].weight} is trained in parts, {parts[0].name} first, and FSDP2 cuts it in "
            "its own way. A larger budget draws it as a whole; or leave it out with targets=."
        )
    keys = {id(piece.parameter): piece.key for piece in first}
    for piece in pieces:
        if piece.map is not None:
            there = (id(table), keys[id(piece.parameter)])
            piece.parameter, piece.twin = twins.get(there, (piece.parameter, None))


def check_cut(sites: Iterable[Site], twins: sharding.Twins) -> None:
    """Raise ModelError if a weight is a DTensor in another way than `fully_shard` makes them."""
    for site in sites:
        place = (id(site.owner), site.key)
        sharded, whole = twins.get(place, (site.current(), None))
        if not isinstance(sharded, DTensor):
            continue
        if isinstance(whole, DTensor) or place not in twins:
            raise ModelError(
                f"{site.name} is a DTensor in forward too: tensor parallelism is not supported. "
                "Shard by FSDP2 alone, torch.distributed.fsdp.fully_shard(model)."
            )
        if site.map is not None and any(
            p.is_shard() and not p.is_shard(0) for p in sharded.placements
        ):
            raise ModelError(
                f"{site.name} is sharded as {sharded.placements}, and steps can only be carried "
                "into what is cut along its first dimension. Leave shard_placement_fn= out."
            )


def replicated(pieces: Sequence[Piece]) -> Sequence[Piece]:
    """Return coordinates that every rank holds whole, beside weights that are cut.

    They were made after `fully_shard`; we average their gradients. Raises ModelError if a weight is
    whole that should be cut, or if an optimizer would meet both kinds.
    """
    plain = [piece for piece in pieces if not sharding.is_cut(piece.parameter)]
    alone = [piece for piece in plain if piece.map is None]
    if alone:
        raise ModelError(
            f"{alone[0].weight} is not sharded, and others are: its gradient would not be averaged "
            "over ranks. Shard the whole model too, after its blocks: fully_shard(model)."
        )
    if plain and len(plain) < len(pieces):
        raise ModelError(
            f"the coordinates of {plain[0].weight} are whole on each rank, and other weights that "
            "are trained are sharded: no torch optimizer steps both. Call surgery.apply first, and "
            "fully_shard afterwards."
        )
    return plain


def average_replicated(pieces: Sequence[Piece], sites: Iterable[Site]) -> None:
    """Average the gradients of coordinates that every rank holds whole."""
    cut = next(w for site in sites if isinstance(w := site.weight(), DTensor))
    sharding.average([piece.parameter for piece in pieces if piece.active], cut)
