"""Reads of a weight with what is added to it: nodes of captured graphs.

A node finds what it has to add by the identity of the weight that it is given; a weight that has
none is read as it is, by autograd too if it is trained by backward. Of others autograd sees none.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from surgery.compat.tensors import is_fake
from surgery.graph.nodes import gate
from surgery.weights.matrices import wide
from surgery.weights.sites import read, site_of
from surgery.zeroth_order.direction import Perturbation
from surgery.zeroth_order.thin import LowRank

HALF = (torch.bfloat16, torch.float16)


def found(weight: Any) -> Perturbation | None:
    """Return what stands beside a weight, and note that a graph has read it.

    None for one that its user has frozen: it would add to slopes, and not be moved. None too for
    one that the direction under way leaves out.
    """
    if is_fake(weight) or not isinstance(weight, Tensor):
        return None
    site = read(weight)
    if site is None or not site.coordinates[0].active:
        return None
    beside = site.beside(Perturbation)
    return beside if beside is not None and beside.is_probed else None


def plain(weight: Tensor) -> Tensor:
    """Return a weight as it is, which autograd sees if it is trained by backward."""
    site = site_of(weight)
    return gate(weight) if site is None or site.beside(Perturbation) is None else weight.detach()


def perturb(weight: Tensor) -> Tensor:
    """Return a weight as it shall be read now."""
    beside = found(weight)
    return plain(weight) if beside is None else beside.perturbed(weight.dtype)


def perturb_wide(weight: Tensor) -> Tensor:
    """Return a vector in float32: in bfloat16, most of a norm's entries would not move."""
    beside = found(weight)
    dtype = wide(weight)
    return plain(weight).to(dtype) if beside is None else beside.perturbed(dtype)


def perturbed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b with what is added to W and b."""
    return _linear(x, weight, bias, transposed=False)


def perturbed_addmm(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return b + x W, as GPT-2 does it, with what is added to W and b."""
    return _linear(x, weight, bias, transposed=True)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    beside = found(weight)
    half = bias is not None and bias.dtype in HALF
    added = None if bias is None or half else perturb(bias)
    if beside is None or isinstance(beside, LowRank):
        matrix = plain(weight)
        y = functional.linear(x, matrix.t() if transposed else matrix, added)
        y = y if beside is None else beside.add_to(y, x, transposed)
    else:
        y = beside.multiply(x, transposed, added)
    if half:
        assert bias is not None
        y = (y.to(wide(y)) + perturb_wide(bias)).to(y.dtype)
    return y


def perturbed_embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Return rows of W with what is added to them; z is drawn for these rows only."""
    beside = found(weight)
    y = functional.embedding(ids, plain(weight))
    if beside is None or beside.probe.shift is None:
        return y
    if ids.numel() >= weight.shape[0]:
        return functional.embedding(ids, beside.perturbed(weight.dtype))
    shift, slot, flat = beside.probe.shift, beside.probe.slot, rearrange(ids, "... -> (...)")
    if isinstance(shift, Tensor):
        z = beside.gather(slot, flat).view(y.shape)
        return y + shift.to(y.dtype) * z.to(y.dtype)
    # A view: it is written.
    return beside.perturbed_rows(y.view(-1, weight.shape[1]), flat).view(y.shape)
