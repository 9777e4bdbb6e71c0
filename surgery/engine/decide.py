"""What a surgery will be: decided from a model and its passes, before anything changes.

`surgery.apply` carries a decision out, `surgery.plan` prints it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from surgery.compat import modules
from surgery.compat.dynamo import Backend, is_around
from surgery.compat.hf import Workarounds
from surgery.contract.method import EVERY, Method, overrides
from surgery.contract.registry import registered
from surgery.engine.compile import check_backend
from surgery.engine.finding import check_alone, surgery_of
from surgery.engine.guards import check_layout
from surgery.errors import ConflictError, ModelError, OptionError
from surgery.kernels.plan import Compile
from surgery.weights import additions as additions_of
from surgery.weights.additions import Addition
from surgery.weights.coordinate import Coordinate
from surgery.weights.sites import Site
from surgery.weights.table import TABLE


@dataclass(frozen=True, eq=False, kw_only=True)
class Decision:
    """What was decided for one model.

    passes: as given, and methods: the state of each, in the same order. rewriting: those that
    rewrite graphs, in the order in which they do. sites: the weights that passes train, with their
    coordinates, in the model's order; none if every pass is exact. flags: `requires_grad` of the
    model's parameters as it was. backend: that compiles rewritten graphs. compile: of kernels.
    """

    model: nn.Module
    passes: tuple[Any, ...]
    methods: tuple[Method, ...]
    rewriting: tuple[Method, ...]
    sites: tuple[Site, ...]
    flags: tuple[tuple[nn.Module, str, bool], ...]
    workarounds: Workarounds
    backend: Backend | None
    compile: Compile

    @cached_property
    def coordinates(self) -> Sequence[Coordinate]:
        """Those of all sites."""
        return [each for site in self.sites for each in site.coordinates]

    @cached_property
    def additions(self) -> Sequence[Addition]:
        """What the passes put on the model."""
        return _additions(self.methods)


def decide(
    model: nn.Module,
    passes: Sequence[Any],
    backend: Backend | None = None,
    data: bool = True,
    compile: Compile = "auto",
) -> Decision:
    """Return what a surgery will be; changes nothing of the model.

    passes: checked options. data: whether the weights must be there (not on the meta device).
    compile: see `surgery.apply`.
    Raises OptionError, TargetError, ModelError, ConflictError.
    """
    _check_model(model, data)
    _check_twice(passes)
    methods = tuple(_started(options, model) for options in passes)
    _check_conflicts(methods)
    check_backend(methods, backend)
    if compile not in (True, False, "auto"):
        raise OptionError(f'compile={compile!r} must be True, False or "auto" (on accelerators).')
    return Decision(
        model=model,
        passes=tuple(passes),
        methods=methods,
        rewriting=_in_order([m for m in methods if overrides(m, "rewrite")]),
        sites=_sites(model, methods),
        flags=tuple(
            (owner, key, p.requires_grad)
            for root in (model, *_additions(methods))
            for owner in root.modules()
            for key, p in owner.named_parameters(recurse=False)
        ),
        workarounds=Workarounds(model),
        backend=backend,
        compile=compile,
    )


def _check_model(model: nn.Module, data: bool) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"surgery takes an nn.Module, not a {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"this model is a {type(model).__name__}, whose forward is not Python code and cannot "
            "be captured. Apply to the module that it was scripted or traced from."
        )
    if is_around(model):
        raise ModelError(
            "torch.compile is around this model already, and runs the code that it has compiled: "
            "a rewrite would have no effect. Apply first: surgery.apply(model, ...), then "
            "torch.compile(model)."
        )
    present = surgery_of(model)
    if present is not None:
        names = ", ".join(options.name for options in present.decision.passes)
        raise ModelError(
            f"surgery was applied to this {type(model).__name__} already ({names}). Give all "
            "passes in one list, or call surgery.remove(model) first."
        )
    check_alone(model)
    if isinstance(model, DistributedDataParallel | DataParallel):
        raise ModelError(
            f"this model is already wrapped in {type(model).__name__}, which has set itself up for "
            "its parameters. Apply first, wrap afterwards: surgery.apply(model, ...), then "
            f"{type(model).__name__}(model)."
        )
    check_layout(model)
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ModelError(f"this {type(model).__name__} has no parameters: nothing to train.")
    if modules.child(model, TABLE) is not None:
        raise ModelError(
            f"{type(model).__name__} has a child {TABLE!r}, and surgery needs this name for its "
            "coordinates. Rename the child."
        )
    made = [name for name, parameter in parameters.items() if parameter.is_inference()]
    if made:
        raise ModelError(
            f"{len(made)} parameters were made under torch.inference_mode(), such as {made[0]}, "
            "and torch cannot train these. Build or load the model outside of inference_mode."
        )
    meta = [name for name, parameter in parameters.items() if parameter.is_meta]
    if meta and data:
        raise ModelError(
            f"{len(meta)} parameters are on the meta device, such as {meta[0]}. Load the weights "
            "before surgery.apply. To see what a pass would do, use surgery.plan(model, ...)."
        )


def _check_twice(passes: Sequence[Any]) -> None:
    for options in passes:
        if list(passes).count(options) > 1:
            raise ConflictError(f"{options.name} is given twice: {options!r}. Leave one out.")


def _started(options: Any, model: nn.Module) -> Method:
    """Return the state of a pass on a model. Raises OptionError if the pass is made wrongly."""
    method = options.start(model)
    kind = f"{type(options).__name__}.start(model)"
    if not isinstance(method, Method):
        what = method.__name__ if isinstance(method, type) else type(method).__name__
        what = f"the class {what}" if isinstance(method, type) else f"a {what}"
        raise OptionError(
            f"{options.name}: {kind} returns {what}. It must return the state of the pass on this "
            "model, an instance of a subclass of surgery.passkit.Method."
        )
    name = getattr(method, "name", None)
    if name not in (options.name, *registered()):  # the state may be that of another pass
        raise OptionError(
            f"{options.name}: the state that {kind} returns is called {name!r}. Passes find one "
            f"another by name: write `name: str = {options.name!r}` in {type(method).__name__}."
        )
    for what in ("after", "before"):
        if isinstance(getattr(method, what), str):
            raise OptionError(
                f"{options.name}: {what} = {getattr(method, what)!r} is a string. Give a tuple "
                f"of names: {what} = ({getattr(method, what)!r},)."
            )
    if not isinstance(method.conflicts, Mapping):
        raise OptionError(
            f"{options.name}: conflicts is a {type(method.conflicts).__name__}. Give a reason for "
            'each: conflicts = {"name of the other": "why the two do not go together"}.'
        )
    return method


def _check_conflicts(methods: Sequence[Method]) -> None:
    for method in methods:
        for other in methods:
            why = method.conflicts.get(other.name, method.conflicts.get(EVERY))
            if other is not method and why is not None:
                raise ConflictError(
                    f"{method.name} and {other.name} cannot be applied together. About "
                    f"{method.name}: {why.replace('{other}', other.name)}. Leave one of them out."
                )


def _in_order(methods: Sequence[Method]) -> tuple[Method, ...]:
    """Return passes so that each comes after those that it names, else in the order given.

    Names count before EVERY: who names one that comes after all others comes after them, too.
    """
    count = range(len(methods))
    pairs = [(i, j) for i in count for j in count if i != j]
    first = {(i, j) for i, j in pairs if _says(methods[i], methods[j])}
    for k in count:
        first |= {(i, j) for i in count for j in count if {(i, k), (k, j)} <= first}
    first |= {(i, j) for i, j in pairs if (j, i) not in first and _ranks(methods[i], methods[j])}
    waiting, found = [*count], []
    while waiting:
        ready = [j for j in waiting if not any((i, j) in first for i in waiting if i != j)]
        if not ready:
            names = " and ".join(methods[i].name for i in waiting)
            raise ConflictError(
                f"{names} each want to rewrite after the other (`after` and `before` of their "
                "states), so they cannot be applied together. Leave one of them out."
            )
        found.append(methods[ready[0]])
        waiting.remove(ready[0])
    return tuple(found)


def _says(first: Method, then: Method) -> bool:
    """Whether one of two passes names the other, to come in this order."""
    return first.name in then.after or then.name in first.before


def _ranks(first: Method, then: Method) -> bool:
    """Whether one of two passes comes first because the other comes after all, or it before all."""
    last, foremost = EVERY in then.after, EVERY in first.before
    return (last and EVERY not in first.after) or (foremost and EVERY not in then.before)


def _additions(methods: Sequence[Method]) -> list[Addition]:
    return [each for method in methods for each in method.additions]


def _sites(model: nn.Module, methods: Sequence[Method]) -> tuple[Site, ...]:
    # Passes that sample draw from what passes that map have made of the same weights, except where
    # these come without a gradient from backward.
    for method in [each for each in methods if not overrides(each, "drive")]:
        for each in [c for c in method.coordinates if c.mapped]:
            for other in methods:
                if other is not method and other.adopt(each):
                    break
    claims: dict[str, tuple[Method, list[Coordinate]]] = {}
    for method in methods:
        for each in method.coordinates:
            holder, own = claims.setdefault(each.weight, (method, []))
            if each in own:
                continue
            if holder is not method:
                parts = any(c.index is not None for c in [each, *own])
                way = "; or raise budget=, so that it is drawn as a whole" if parts else ""
                raise ConflictError(
                    f"{holder.name} and {method.name} both train {each.name}. Give each its own "
                    f"weights with targets=..., or leave one of them out{way}."
                )
            own.append(each)
    additions = _additions(methods)
    names = [*dict(model.named_parameters()), *additions_of.named(additions)]
    order = [name for name in names if name in claims]
    return tuple(
        Site(
            name=name,
            owner=additions_of.owner_of(model, additions, name),
            coordinates=tuple(claims[name][1]),
        )
        for name in order
    )
