"""Logits that are not computed, in autograd's graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgery.compat.tensors import plainly, wrapper
from surgery.errors import SurgeryError
from surgery.logits.expression import (
    Expression,
    check_unchanged,
    leaves_of,
    value_of,
    whole_leaf,
)


class Linked(torch.autograd.Function):
    """Where logits stand in autograd's graph, for who looks at it or hands them to a Function of
    its own: their gradient, if there ever is one, goes on as if they had been computed."""

    @staticmethod
    def forward(ctx: Any, how: tuple[Any, ...], *tensors: Tensor) -> Tensor:
        kind, _, shape, dtype, _ = ctx.how = how
        return wrapper(kind, shape, dtype, tensors[0].device)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _, (expression,), _, _, moved = ctx.how
        if expression is None:
            raise SurgeryError(
                "backward has reached logits that were changed in place after chunked_loss had "
                "returned them. Write logits = logits / t, not logits /= t."
            )
        check_unchanged(expression)
        (slope,) = grads
        slope = slope.movedim(1, -1) if moved else slope
        tensors = [t for leaf in leaves_of(expression) for t in leaf.tensors if t is not None]
        needs = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            value = computed(expression).expand(slope.shape)
        wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
        found = iter(torch.autograd.grad(value, wanted, slope, allow_unused=True))
        return None, *(next(found) if need else None for need in needs)


def computed(expression: Expression) -> Tensor:
    """Return what an expression comes to, for all rows at once."""
    return value_of(expression, {id(leaf): whole_leaf(leaf) for leaf in leaves_of(expression)})


class _Entered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Any) -> Tensor:
        value = computed(t.expression)
        return value.movedim(-1, 1) if t.moved else value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def is_foreign(t: Tensor) -> bool:
    """Whether logits are what a Function of others has returned, whose backward is theirs."""
    with plainly():
        return t.grad_fn is not None and type(t.grad_fn).__name__ != f"{Linked.__name__}Backward"


def entered(t: Tensor) -> Tensor:
    """Return logits of a Function of others as a plain tensor behind that Function."""
    return _Entered.apply(t)
