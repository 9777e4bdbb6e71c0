"""A Linear and its gradients by hand, however its weight is stored and whatever it is made of."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from surgery.compat.tensors import is_wrapper


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Return x W^T + b; for a weight that is stored as (in, out), b + x W."""
    if not transposed:
        return functional.linear(x, weight, bias)
    assert bias is not None  # GPT-2's Conv1D always has one
    return torch.addmm(bias, x, weight)


def rows_of(x: Tensor) -> Tensor:
    """Return x (..., channels) as rows (rows, channels)."""
    return rearrange(x, "... channels -> (...) channels")


def input_gradient(rows: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """Return dx = g W, in the dtype of g (rows, out)."""
    return rows @ _out_by_in(weight, rows, transposed)


def add_input_gradient(into: Tensor, rows: Tensor, weight: Tensor, transposed: bool) -> None:
    """Add dx = g W to a gradient of the same dtype (rows, in), in one pass over it."""
    into.addmm_(rows, _out_by_in(weight, rows, transposed))


def sent_back(
    ctx: Any, grad: Tensor, weight: Tensor, transposed: bool, bias: int
) -> tuple[Tensor | None, Tensor | None]:
    """Return dx and db of a Linear that is a node of autograd, as far as they are needed.

    ctx: of the node, whose first input is x and whose input of number `bias` is b. given: shape and
    dtype of x, and the dtype of b, as `note_given` has noted them.
    """
    rows, (shape, dtype, own) = rows_of(grad), ctx.given
    dx = db = None
    if ctx.needs_input_grad[0]:
        dx = input_gradient(rows, weight, transposed).view(shape).to(dtype)
    if ctx.needs_input_grad[bias]:
        db = rows.sum(0).to(own)
    return dx, db


def note_given(ctx: Any, x: Tensor, bias: Tensor | None) -> None:
    """Note in forward what `sent_back` wants to know."""
    ctx.given = x.shape, x.dtype, None if bias is None else bias.dtype


def _out_by_in(weight: Tensor, rows: Tensor, transposed: bool) -> Tensor:
    matrix = dequantised(weight).to(rows.dtype)
    return matrix.t() if transposed else matrix


def dequantised(weight: Tensor) -> Tensor:
    """Return a weight as plain numbers; torchao's tensors multiply x, but not a gradient."""
    return weight.dequantize() if is_wrapper(weight) else weight
