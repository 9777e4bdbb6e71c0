"""Bytes of weights, gradients and optimizer state, from a decision alone."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from surgery.engine.decide import Decision
from surgery.memory import Bytes, storage_bytes
from surgery.weights.coordinate import Coordinate, unique
from surgery.weights.table import TABLE, floor_sizes


def bytes_of(
    decision: Decision, trainable: Iterable[nn.Parameter], state: int | None = None
) -> tuple[Bytes, Bytes]:
    """Return what training holds without surgery, and with it as it is now, with Adam.

    trainable: the weights that required gradients before. state: bytes of optimizer state that are
    there already (default: two numbers for each that is trained now).
    """
    named = decision.model.named_parameters()
    added = [p for each in decision.additions for p in each.parameters()]
    beside = {id(p) for p in added}
    own = [p for name, p in named if TABLE not in name.split(".") and id(p) not in beside]
    coordinates = unique(decision.coordinates)
    dense = sum(_size(p) for p in trainable if id(p) not in beside)
    active = [c.parameter for c in unique(c for c in decision.coordinates if c.active)]
    live = sum(map(_size, active)) if decision.sites else dense
    mapped = [each.parameter for each in coordinates if each.mapped]
    carried = [c.mapped.carried for c in decision.coordinates if c.mapped]
    held = 2 * live if state is None else state
    return (
        Bytes(parameters=storage_bytes(own), gradients=dense, optimizer=2 * dense),
        Bytes(
            parameters=storage_bytes(
                [*own, *added, *mapped, *(t for t in carried if t is not None)]
            )
            + _copies([each for each in coordinates if each.copied]),
            gradients=live,
            optimizer=held,
        ),
    )


def _copies(copies: Iterable[Coordinate]) -> int:
    """Return the bytes of copies: of those that are trained, and of the floor of the others."""
    trained = sum(_size(each.parameter) for each in copies if each.active)
    floors = floor_sizes(each.parameter for each in copies if not each.active)
    return trained + sum(count * dtype.itemsize for (_, dtype), count in floors.items())


def _size(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()
