"""Which weights: the repeated blocks of a model, their matrices, and `targets=` in PEFT's words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from torch import nn

from surgery.errors import TargetError, listed, near_misses
from surgery.weights.modules import is_linear_module, output_head

Targets: TypeAlias = str | Sequence[str] | None


def blocks(model: nn.Module) -> dict[str, list[str]]:
    """Return the repeated blocks of a model, in order, each with the names of its parameters.

    Blocks are found by the module tree alone: they are the children of every outermost
    `nn.ModuleList` (or of an `nn.Sequential` or fx container whose children are composite and of
    one class). In a model without any, each module that owns a matrix counts as a block, except
    embeddings and the output head.
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


# -- targets=, always= -----------------------------------------------------------------------------


def select(model: nn.Module, targets: str | Sequence[str], what: str) -> list[str]:
    """Return the names of the parameters that `targets` matches, in the model's order.

    The rules are PEFT's for `target_modules`, applied to modules and to parameters: a list matches
    a name exactly or as its last dotted part(s); a string is a regular expression for the whole
    name; "all-linear" is every Linear but the output head. A module stands for its own parameters.

    Raises TargetError if some entry matches nothing, with the nearest names.
    """
    parameters = [name for name, _ in model.named_parameters()]
    hit = matched(model, targets, what)
    chosen = [n for n in parameters if n in hit or n.rpartition(".")[0] in hit]
    if not hit:
        raise TargetError(f"{what}={targets!r} names nothing. Leave it out, or name some modules.")
    if not chosen:
        own = {id(p): name for name, p in model.named_parameters()}
        modules = dict(model.named_modules())
        held = [p for name in hit & {*modules} for p in modules[name].parameters(recurse=False)]
        if held:
            raise TargetError(
                f"{what}={targets!r} matches only weights that are tied to others. Use the names "
                f"of those: {listed([own[id(p)] for p in held], 3)}."
            )
        raise TargetError(
            f"{what}={targets!r} matches only modules that own no parameters, such as "
            f"{listed(sorted(hit), 3)}. Name the projections inside of them."
        )
    return chosen


def matched(model: nn.Module, targets: str | Sequence[str], what: str) -> set[str]:
    """Return the names of the modules and parameters that `targets` matches; see `select`."""
    modules = {name: module for name, module in model.named_modules() if name}
    names = [*modules, *(name for name, _ in model.named_parameters())]
    if targets == "all-linear":
        head = output_head(model)
        return {n for n, m in modules.items() if is_linear_module(m) and m is not head}
    hit: set[str] = set()
    for pattern in [targets] if isinstance(targets, str) else list(targets):
        rule = pattern if isinstance(targets, str) else [pattern]
        if isinstance(rule, str):
            _check_pattern(rule, what)
        found = {name for name in names if _match(rule, name)}
        if not found:
            raise _nothing(pattern, what, names)
        hit |= found
    return hit


def _check_pattern(pattern: str, what: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise TargetError(
            f"{what}={pattern!r} is not a regular expression: {error}. A string stands for the "
            f'whole name (".*q_proj"); ends of names go into a list, {what}=["q_proj"].'
        ) from error


def _match(rule: str | list[str], name: str) -> bool:
    """Whether PEFT's `check_target_module_exists` says so; tested beside it, name by name."""
    if isinstance(rule, str):
        return re.fullmatch(rule, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in rule)


def _nothing(pattern: str, what: str, names: list[str]) -> TargetError:
    tails = {".".join(name.split(".")[-k:]) for name in names for k in (1, 2)}
    meant = f" Did you mean {what}=[{pattern!r}]?" if pattern in tails else ""
    return TargetError(
        f"{what}={pattern!r} matches no module and no parameter."
        f"{meant or near_misses(pattern, tails)} "
        'A list entry matches a name or its end ("q_proj"); a string is a regular expression for '
        f'the whole name (".*q_proj"). Names look like {names[len(names) // 2]!r}.'
    )
