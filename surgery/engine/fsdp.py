"""FSDP2 around a model under surgery: whose parameters it has cut, and what it has left whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from torch.distributed.tensor import DTensor

from surgery.compat.fsdp import Twins
from surgery.errors import ModelError
from surgery.weights import shards
from surgery.weights.coordinate import Coordinate
from surgery.weights.indices import Rows
from surgery.weights.sites import Site


def take_cut(
    first: Sequence[Coordinate],
    coordinates: Sequence[Coordinate],
    table: nn.Module | None,
    twins: Twins,
) -> None:
    """Let mapped coordinates be the parameters that `fully_shard` has put into the table.

    first: the coordinates that gave their names to the table's parameters. Raises ModelError if a
    weight is trained in parts.
    """
    parts = [each for each in coordinates if each.index is not None]
    if parts and isinstance(parts[0].index, Rows):
        raise ModelError(
            f"only some rows of {parts[0].weight} are trained, but FSDP2 shards its rows in its "
            "own way. Train the whole weight, or use DistributedDataParallel."
        )
    if parts:
        raise ModelError(
            f"{parts[0].weight} is trained in parts, such as {parts[0].name}, but FSDP2 shards it "
            "in its own way. Raise budget=, so that the weight is drawn as a whole, or leave it "
            "out with targets=."
        )
    keys = {id(each.parameter): each.key for each in first}
    for each in coordinates:
        if each.mapped:
            there = (id(table), keys[id(each.parameter)])
            each.parameter, each.twin = twins.get(there, (each.parameter, None))


def check_cut(sites: Iterable[Site], twins: Twins) -> None:
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
        if site.mapped and any(p.is_shard() and not p.is_shard(0) for p in sharded.placements):
            raise ModelError(
                f"{site.name} is sharded as {sharded.placements}, but the steps of its coordinates "
                "can only be added to weights that are sharded along their first dimension. Leave "
                "shard_placement_fn= out."
            )


def replicated(coordinates: Sequence[Coordinate]) -> Sequence[Coordinate]:
    """Return coordinates that every rank holds whole, beside weights that are cut.

    They were made after `fully_shard`; we average their gradients. Raises ModelError if a weight is
    whole that should be cut, or if an optimizer would meet both kinds.
    """
    plain = [each for each in coordinates if not shards.is_cut(each.parameter)]
    alone = [each for each in plain if not each.mapped]
    if alone:
        raise ModelError(
            f"{alone[0].weight} is not sharded, but other weights are, so its gradient would not "
            "be averaged over ranks. Shard the whole model too, after its blocks: "
            "fully_shard(model)."
        )
    if plain and len(plain) < len(coordinates):
        raise ModelError(
            f"the coordinates of {plain[0].weight} are whole on each rank, and other weights that "
            "are trained are sharded: no torch optimizer can step both. Call surgery.apply first, "
            "and fully_shard afterwards."
        )
    return plain


def average_replicated(coordinates: Sequence[Coordinate], sites: Iterable[Site]) -> None:
    """Average the gradients of coordinates that every rank holds whole."""
    sites = [*sites]
    cut = next(w for site in sites if isinstance(w := site.weight(), DTensor))
    live = {
        id(c.parameter) for site in sites for c in site.coordinates if c.active
    }  # shared ones too
    shards.average([c.parameter for c in coordinates if id(c.parameter) in live], cut)
