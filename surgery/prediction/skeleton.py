"""Models and batches without memory, as they would be."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.compat.tensors import is_wrapper
from surgery.errors import ModelError


def skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose tensors have no memory; to be called on a stage.

    Raises ModelError, naming a weight of a kind that has its own idea of memory.
    """
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or is_wrapper(parameter):
            raise ModelError(
                f"{name} is a {type(parameter).__name__}, whose memory is not that of its shape"
            )
        memo[id(parameter)] = nn.Parameter(_hollow(parameter), parameter.requires_grad)
    for _, buffer in model.named_buffers():
        memo[id(buffer)] = _hollow(buffer)
    return copy.deepcopy(model, memo)


def hollow(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch whose tensors have no memory; to be called on a stage."""
    return {k: _hollow(v) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _hollow(t: Tensor) -> Tensor:
    # On the CPU whatever the device: on meta, attention takes its mathematical form.
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")
