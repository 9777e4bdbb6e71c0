"""Linears of stacked experts, (experts, out, in): rows of x, sorted by expert, times each's own."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from surgery.compat.autograd import first_order_only
from surgery.graph.reading import name_of


class Read(NamedTuple):
    """A product of sorted rows x with the experts' matrices, and where each expert's rows end."""

    x: Node
    weight: Node
    offsets: Node


def read(node: Node) -> Read | None:
    """Return what a node multiplies, if it is the product of a mixture of experts, W transposed."""
    if not name_of(node).lstrip("_").startswith("grouped_mm"):
        return None
    options = {key: value for key, value in node.kwargs.items() if value is not None}
    x, turned = node.args[:2]
    if not isinstance(turned, Node) or name_of(turned) != "transpose" or [*options] != ["offs"]:
        return None
    weight, *dims = turned.args
    if {int(str(dim)) % 3 for dim in dims} != {1, 2}:
        return None
    offsets = options["offs"]
    assert isinstance(x, Node) and isinstance(weight, Node) and isinstance(offsets, Node)
    return Read(x, weight, offsets)


def is_fused(node: Node) -> bool:
    """Whether the product is torch's own kernel, not transformers' loop over the experts."""
    return "fallback" not in name_of(node)


def multiply(x: Tensor, weight: Tensor, offsets: Tensor, fused: bool) -> Tensor:
    """Return the rows x (rows, in) times each expert's own matrix of weight (experts, in, out).

    fused: see `is_fused`.
    """
    if fused:
        return functional.grouped_mm(x, weight, offs=offsets)
    return torch.ops.transformers.grouped_mm_fallback(x, weight, offs=offsets)


class ProjectedExperts(torch.autograd.Function):
    """y = x W_e^T, keeping z (rows, k); B_e's gradient is g_e^T z_e, in (experts * out, k)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor,
        weight: Tensor,
        offsets: Tensor,
        coordinate: Tensor,
        fused: bool,
    ) -> Tensor:
        ctx.wanted, ctx.fused = coordinate.dtype, fused
        ctx.save_for_backward(z, weight, offsets)
        return multiply(x, weight.transpose(-2, -1), offsets, fused)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        first_order_only("rso of stacked experts")
        z, weight, offsets = ctx.saved_tensors
        grad = grads[0].contiguous()
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = multiply(grad, weight, offsets, ctx.fused)
        if ctx.needs_input_grad[4]:
            experts, out, _ = weight.shape
            db = grad.new_zeros(experts, out, z.shape[-1], dtype=ctx.wanted)
            ends = offsets.tolist()
            for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
                part = slice(start, end)
                db[expert] = grad[part].t() @ z[part].to(grad.dtype)
            db = rearrange(db, "expert out k -> (expert out) k")
        return dx, None, None, None, db, None
