"""Linears whose weight gets its gradient reduced: of a coordinate's shape, never of the weight's.

With y = x W^T + b and g = dL/dy, dW = g^T x. A pass whose coordinate wants a linear map of dW
alone, (P^T g^T) x or g^T (x P), says so beside the weight; forward keeps x as any Linear does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from surgery.compat.autograd import first_order_only
from surgery.graph.linear import linear, note_given, rows_of, sent_back
from surgery.graph.nodes import by_identity
from surgery.graph.reading import is_linear, operands
from surgery.weights.coordinate import Beside
from surgery.weights.sites import trained_by


class Reduction(Beside, ABC):
    """What stands beside a weight whose gradient is reduced. transposed: whether the weight is
    stored as (in, out). by: name of the pass, for its errors."""

    transposed: bool
    by: ClassVar[str] = "a reduction"

    @abstractmethod
    def gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return the coordinate's gradient, of g (rows, out) and x (rows, in), of one dtype."""


@by_identity
def reduced(
    x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, place: Tensor
) -> Tensor:
    """Return x W^T + b (or x W + b if transposed); the gradient goes to the weight's coordinate.

    place: the model's own parameter, by whose identity the coordinate is found; `weight` may be
    what another pass has made of it.
    """
    found = trained_by(place, Reduction)
    if found is None:
        return linear(x, weight.detach(), bias, transposed)
    coordinate, reduction = found
    return _Reduced.apply(x, weight.detach(), bias, coordinate.read, reduction)


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        coordinate: Tensor,
        reduction: Reduction,
    ) -> Tensor:
        ctx.reduction = reduction
        note_given(ctx, x, bias)
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias, reduction.transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only(ctx.reduction.by)
        x, weight = ctx.saved_tensors
        dx, db = sent_back(ctx, grads[0], weight, ctx.reduction.transposed, bias=2)
        own = None
        if ctx.needs_input_grad[3]:
            rows = rows_of(grads[0])
            own = ctx.reduction.gradient(rows, rows_of(x).to(rows.dtype))
        return dx, None, db, own, None


# -- as nodes of a graph ---------------------------------------------------------------------------


def is_reader(node: Node) -> bool:
    """Whether a node is a Linear, its weight's gradient reduced or not."""
    return is_linear(node) or node.target is reduced


def read_by(reader: Node) -> list[Node]:
    """Return the input of a reader, the weight, and the bias if there is one."""
    if reader.target is not reduced:
        return operands(reader)
    return [arg for arg in reader.args[:3] if isinstance(arg, Node)]


def is_turned(reader: Node) -> bool:
    """Whether the weight of a reader is stored as (in, out)."""
    return bool(reader.args[3]) if reader.target is reduced else reader.target is torch.addmm


def place_of(reader: Node) -> Node | None:
    """Return the model's own parameter of a reader whose weight's gradient is reduced."""
    place = reader.args[4] if reader.target is reduced else None
    return place if isinstance(place, Node) else None
