"""Which weights: the repeated blocks of a model, their matrices, and `targets=` in PEFT's words."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from surgery.coordinates import Index
from surgery.errors import TargetError, listed, near_misses

Targets: TypeAlias = str | Sequence[str] | None


def blocks(model: nn.Module) -> dict[str, list[str]]:
    """Return the repeated blocks of a model, in order, each with the names of its parameters.

    Found from the module tree alone: the children of every outermost `nn.ModuleList` (or
    `nn.Sequential`, or fx container, of like composite children). A model that has none counts each
    module that owns a matrix as a block, embeddings and the output head left out.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    taken: set[int] = set()
    found: dict[str, list[str]] = {}
    for name, block in _stacked(model, ""):
        own = [p for p in block.parameters() if id(p) not in taken]
        taken |= {id(p) for p in own}
        if own:
            found[name] = [names[id(p)] for p in own]
    return found or _leaves(model, names)


def _stacked(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if _is_stack(child):
            for index, block in child.named_children():
                yield f"{prefix}{name}.{index}", block
        else:
            yield from _stacked(child, f"{prefix}{name}.")


def _is_stack(module: nn.Module) -> bool:
    children = list(module.children())
    if not any(p.ndim > 1 for child in children for p in child.parameters()):
        return False
    if isinstance(module, nn.ModuleList):
        return True
    # torch.fx keeps the names of a ModuleList's children but not its class.
    numbered = all(name.isdigit() for name, _ in module.named_children())
    composite = all(any(True for _ in child.children()) for child in children)
    return numbered and composite and len(children) > 1 and len({type(c) for c in children}) == 1


def _leaves(model: nn.Module, names: dict[int, str]) -> dict[str, list[str]]:
    head = output_head(model)
    return {
        name: own
        for name, module in model.named_modules()
        if not isinstance(module, nn.Embedding) and module is not head
        if any(p.ndim > 1 for p in module.parameters(recurse=False))
        if (own := [names[id(p)] for p in module.parameters(recurse=False) if id(p) in names])
    }


def output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def is_matrix(model: nn.Module, name: str) -> bool:
    """Whether a parameter is a weight matrix (2-D, a convolution, stacked experts), not a bias."""
    parameter = model.get_parameter(name)
    owner = model.get_submodule(name.rpartition(".")[0])
    return (
        parameter.ndim > 1
        and parameter.is_floating_point()
        and not name.endswith("bias")
        and not isinstance(owner, nn.Embedding)
    )


# -- row blocks ------------------------------------------------------------------------------------


def split(model: nn.Module, name: str, limit: int) -> list[Index | None]:
    """Return the blocks that a weight is trained in; [None] for the whole weight.

    Stacked experts: one block per expert. Fused projections (query, key and value; gate and up):
    one block per part, recognised by their sizes, which the model's config gives. What is still
    larger than `limit` parameters: as few blocks of rows as fit, of one row at least.
    """
    weight = model.get_parameter(name)
    owner = model.get_submodule(name.rpartition(".")[0])
    parts: list[Index | None] = [None]
    if weight.ndim == 3 and not isinstance(owner, _ConvNd):
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


def is_transposed(owner: nn.Module) -> bool:
    """Whether a Linear stores its weight as (in, out)."""
    return type(owner).__name__ == "Conv1D" and hasattr(owner, "nf")  # GPT-2: (in, out)


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


def in_features(owner: nn.Module, weight: Tensor) -> int:
    """Return the width of the input that a Linear's, or stacked experts', weight multiplies."""
    return weight.shape[0] if is_transposed(owner) else weight.shape[-1]


def is_stacked(owner: nn.Module, weight: Tensor) -> bool:
    """Whether a weight is that of Linears of stacked experts, (experts, out, in).

    Others, gpt-oss among them, store (experts, in, out).
    """
    turned = getattr(owner, "is_transposed", False)
    return weight.ndim == 3 and not isinstance(owner, _ConvNd) and not turned


# -- targets=, always= -----------------------------------------------------------------------------


def select(model: nn.Module, targets: str | Sequence[str], what: str) -> list[str]:
    """Return the names of the parameters that `targets` names, in the model's order.

    PEFT's rules for `target_modules`, applied to modules and to bare parameters: a list matches a
    name exactly or as its last dotted part(s); a string is a regular expression for the whole name;
    "all-linear" is every Linear but the output head. A module stands for its own parameters.

    Raises TargetError if some entry matches nothing, with the nearest names.
    """
    parameters = [name for name, _ in model.named_parameters()]
    hit = matched(model, targets, what)
    chosen = [n for n in parameters if n in hit or n.rpartition(".")[0] in hit]
    if not chosen:
        raise TargetError(
            f"{what}={targets!r} matches only modules that own no parameters, such as "
            f"{listed(sorted(hit), 3)}. Name the projections inside of them."
        )
    return chosen


def matched(model: nn.Module, targets: str | Sequence[str], what: str) -> set[str]:
    """Return the names of the modules and parameters that `targets` names; see `select`."""
    modules = {name: module for name, module in model.named_modules() if name}
    names = [*modules, *(name for name, _ in model.named_parameters())]
    if targets == "all-linear":
        head = output_head(model)
        return {n for n, m in modules.items() if is_linear_module(m) and m is not head}
    hit: set[str] = set()
    for pattern in [targets] if isinstance(targets, str) else list(targets):
        rule = pattern if isinstance(targets, str) else [pattern]
        found = {name for name in names if _match(rule, name)}
        if not found:
            raise _nothing(pattern, what, names)
        hit |= found
    return hit


def _match(rule: str | list[str], name: str) -> bool:
    try:
        from peft.tuners.tuners_utils import check_target_module_exists
    except ImportError:
        if isinstance(rule, str):
            return re.fullmatch(rule, name) is not None
        return any(name == entry or name.endswith(f".{entry}") for entry in rule)
    return bool(check_target_module_exists(_Rule(rule), name))


class _Rule:
    """The part of a PEFT config that its matching reads."""

    def __init__(self, target_modules: str | list[str]) -> None:
        self.target_modules = target_modules


def is_linear_module(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def _nothing(pattern: str, what: str, names: list[str]) -> TargetError:
    tails = {".".join(name.split(".")[-k:]) for name in names for k in (1, 2)}
    meant = f" Did you mean {what}=[{pattern!r}]?" if pattern in tails else ""
    return TargetError(
        f"{what}={pattern!r} matches no module and no parameter."
        f"{meant or near_misses(pattern, tails)} "
        'A list entry matches a name or its end ("q_proj"); a string is a regular expression for '
        f'the whole name (".*q_proj"). Names look like {names[len(names) // 2]!r}.'
    )
