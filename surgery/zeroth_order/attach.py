"""Outputs of two evaluations attached to the coordinates, with their slope as gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.compat.autograd import first_order_only
from surgery.errors import SurgeryError
from surgery.weights.coordinate import Coordinate
from surgery.weights.matrices import wide
from surgery.zeroth_order.conservative import Again
from surgery.zeroth_order.direction import perturbation_of

if TYPE_CHECKING:
    from surgery.zeroth_order.method import TwoPoint


class Attach(torch.autograd.Function):
    """Values of outputs, whose gradient goes to the coordinates by the slopes that are kept.

    tensors: the slopes, `count` of them; the values once more, if their gradients go on to weights
    that are trained by backward; the coordinates.
    """

    @staticmethod
    def forward(
        ctx: Any, method: TwoPoint, slots: Sequence[int], again: Again | None,
        values: Sequence[Tensor], count: int, *tensors: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.method, ctx.slots, ctx.step, ctx.used = method, slots, method.step, False
        ctx.again = again
        ctx.count = count
        ctx.save_for_backward(*tensors[:count])
        # No inputs of the node: loops may write into them (loss *= ...).
        return tuple(value.clone() if value.requires_grad else value for value in values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        method: TwoPoint = ctx.method
        first_order_only(method.name)
        if ctx.used or ctx.step != method.step:
            raise SurgeryError(
                f"{method.name}: backward was called "
                + ("twice on one output" if ctx.used else "on an output of an earlier step")
                + ": its slope belongs to the directions of one step. Run the model again."
            )
        ctx.used = True
        if method.judged is not None and ctx.again.counts:
            method.judged.keep(ctx.again, grads[0])
        kept = iter(ctx.saved_tensors)
        factor = method.scale * method.ranks  # data parallel training averages over ranks
        slopes: list[Tensor] = []
        for _ in ctx.slots:
            each = [
                (grad.to(slope) * slope).sum() for grad, slope in zip(grads, kept, strict=False)
            ]
            slopes.append(factor * torch.stack(each).sum())
        found = _to_coordinates(method, ctx.slots, slopes)
        on = grads if len(ctx.needs_input_grad) > 5 + ctx.count + len(found) else ()
        return None, None, None, None, None, *([None] * ctx.count), *on, *found


def _to_coordinates(
    method: TwoPoint, slots: Sequence[int], slopes: list[Tensor]
) -> Sequence[Tensor | None]:
    first = method.weights[0].parameter
    scalars = torch.zeros(method.directions * method.ranks, dtype=wide(first), device=first.device)
    scalars[slots[0] : slots[0] + len(slots)] = torch.stack(slopes).to(scalars)
    if not method.dense:
        return [scalars]
    return [
        None if each.unused or not each.active else _dense(each, scalars) for each in method.weights
    ]


def _dense(coordinate: Coordinate, scalars: Tensor) -> Tensor:
    change = perturbation_of(coordinate).expand(scalars)
    return change.view_as(coordinate.parameter).to(coordinate.parameter.dtype)
