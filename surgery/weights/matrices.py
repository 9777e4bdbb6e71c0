"""Weights as matrices, and the dtype that their steps are computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(weight: Tensor) -> torch.dtype:
    """Return the dtype that steps of a weight are computed in: at least float32."""
    return torch.promote_types(weight.dtype, torch.float32)


def matrix_of(weight: Tensor) -> Tensor:
    """Return a weight as a matrix that shares its storage; stacked experts are put in rows.

    A view, not einops' reshape, which would copy where it must: the matrix is written.
    """
    return weight.detach().view(-1, weight.shape[-1] if weight.ndim else 1)


def matrix_shape(weight: Tensor) -> tuple[int, int]:
    """Return the shape of `matrix_of`; for a sharded weight, that of the whole weight."""
    width = weight.shape[-1] if weight.ndim else 1
    return (weight.numel() // width if width else 0), width
