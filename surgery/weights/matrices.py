"""What the optimizer sees: coordinates, each a parameter with a linear map into a weight.

A coordinate of the sampling passes is a weight itself, or a *block*: a parameter that views a part
of the weight's own storage, so that the optimizer writes straight into the weight. Others are
*mapped*: small parameters of their own, each step of which is carried into the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(weight: Tensor) -> torch.dtype:
    """Return the dtype that steps of a weight are computed in: at least float32."""
    return torch.promote_types(weight.dtype, torch.float32)


def matrix_of(weight: Tensor) -> Tensor:
    """Return a weight as a matrix, sharing its storage: those of experts under one another."""
    return weight.detach().view(-1, weight.shape[-1] if weight.ndim else 1)


def matrix_shape(weight: Tensor) -> tuple[int, int]:
    """Return the shape of `matrix_of`, of all of a weight that is cut too."""
    width = weight.shape[-1] if weight.ndim else 1
    return (weight.numel() // width if width else 0), width
