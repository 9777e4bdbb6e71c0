"""A Linear and its gradients by hand, however its weight is stored and whatever it is made of."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from surgery.compat.tensors import is_wrapper


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Return x W^T + b, or b + x W for a weight that is stored as (in, out)."""
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


def _out_by_in(weight: Tensor, rows: Tensor, transposed: bool) -> Tensor:
    matrix = dequantised(weight).to(rows.dtype)
    return matrix.t() if transposed else matrix


def dequantised(weight: Tensor) -> Tensor:
    """Return a weight as plain numbers; torchao's tensors multiply x, but not a gradient."""
    return weight.dequantize() if is_wrapper(weight) else weight
