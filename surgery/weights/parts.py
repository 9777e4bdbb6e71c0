"""Parts that a weight is trained in: experts, fused projections, blocks of rows."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from surgery.weights.indices import Index
from surgery.weights.modules import CONVOLUTIONS, in_features, is_linear_module, is_transposed


def split(model: nn.Module, name: str, limit: int) -> list[Index | None]:
    """Return the blocks that a weight is trained in; [None] for the whole weight.

    Stacked experts: one block per expert. Fused projections (query, key and value; gate and up):
    one block per part, recognised by their sizes, which the model's config gives. What is still
    larger than `limit` parameters: as few blocks of rows as fit, of one row at least.
    """
    weight = model.get_parameter(name)
    owner = model.get_submodule(name.rpartition(".")[0])
    parts: list[Index | None] = [None]
    if weight.ndim == 3 and not isinstance(owner, CONVOLUTIONS):
        parts = [(expert,) for expert in range(weight.shape[0])]
    elif weight.ndim == 2 and (sizes := _fused(model, owner, name, weight)):
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        spans = [slice(a, a + size) for a, size in zip(starts, sizes, strict=True)]
        parts = [(slice(0, weight.shape[0]), s) if is_transposed(owner) else (s,) for s in spans]
    return [piece for part in parts for piece in _rows(weight, part, limit)]


def _rows(weight: Tensor, part: Index | None, limit: int) -> list[Index | None]:
    block = weight if part is None else weight[part]
    count = -(-block.numel() // limit)
    if count <= 1:
        return [part]
    rows = block.shape[0]
    height = max(1, limit // (block.numel() // rows))
    count = -(-rows // height)
    edges = [rows * i // count for i in range(count + 1)]
    cuts = [slice(a, b) for a, b in itertools.pairwise(edges)]
    return [_within(part, cut) for cut in cuts]


def _within(part: Index | None, cut: slice) -> Index:
    if part is None:
        return (cut,)
    first, *rest = part
    if isinstance(first, int):
        return (first, cut)
    return (slice(first.start + cut.start, first.start + cut.stop), *rest)


def _fused(model: nn.Module, owner: nn.Module, name: str, weight: Tensor) -> tuple[int, ...]:
    out = weight.shape[1] if is_transposed(owner) else weight.shape[0]
    if isinstance(owner, nn.MultiheadAttention) and name.endswith("in_proj_weight"):
        return (out // 3,) * 3
    config = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return ()
    size = getattr(config, "head_dim", None) or hidden // heads
    shared = (getattr(config, "num_key_value_heads", None) or heads) * size
    inner = getattr(config, "intermediate_size", None)
    # A fused projection is followed, in the same module, by the one that reads its result.
    others = [m for m in _siblings(model, name) if m is not owner]
    inputs = {in_features(other, other.get_parameter("weight")) for other in others}
    if out == heads * size + 2 * shared and inputs == {heads * size}:
        return (heads * size, shared, shared)
    return (inner, inner) if inner and out == 2 * inner and inputs == {inner} else ()


def _siblings(model: nn.Module, name: str) -> list[nn.Module]:
    parent = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    return [child for child in parent.children() if is_linear_module(child)]
