"""One training run of a case, and notes of all that laws look at: one capture serves many laws."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.api import apply, coordinates, remove
from surgery.engine.finding import applied
from surgery.testing.case import Case, Moved, anatomy, own, weights
from surgery.weights.additions import named

STEPS = 24  # a dozen rounds
NORM = 0.1  # to which gradients are clipped

Drawn = tuple[list[float], float]  # from torch's generator, and Python's


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step of the optimizer did.

    trained: the weights that were active before it. weights: after it. expected: where the steps of
    the coordinates should have taken them. held: of how many parameters the optimizer held state;
    stray: whether of any that is not live. left: parameters with a gradient after zero_grad.
    """

    trained: set[str]
    weights: dict[str, Tensor]
    expected: dict[str, Tensor]
    held: int
    stray: bool
    left: list[str]


@dataclass(frozen=True, kw_only=True)
class Adjoint:
    """The first gradients beside the dense ones.

    off: weight of the plain model -> by how much, relatively (inf: there is none). untrained:
    weights that are not trained and have one. unlisted: weights whose coordinates `parameters()`
    leaves out.
    """

    off: dict[str, float]
    untrained: list[str]
    unlisted: list[str]


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A run from `apply` to `remove`; pairs are of the plain model and of the rewritten one.

    losses: the first. drawn: what the generators gave after `apply`, and after each forward and
    step. captures: after the first forward and after the last step. anatomy: before `apply` and
    after `remove`. last: weights before and after `remove`. reached: the weights that gradients
    reach, after `remove`.
    """

    losses: tuple[Tensor, Tensor]
    drawn: tuple[list[Drawn], list[Drawn]]
    keys: tuple[list[str], list[str]]
    adjoint: Adjoint
    start: dict[str, Tensor]
    steps: list[Step]
    captures: tuple[int, int]
    anatomy: tuple[dict[str, Any], dict[str, Any]]
    last: tuple[dict[str, Tensor], dict[str, Tensor]]
    reached: tuple[set[str], set[str]]


def watched(case: Case) -> Watched:
    """Return the notes of the run that several laws share; the first that asks runs it."""
    if "watched" not in case.notes:
        case.notes["watched"] = watch(case)
    return case.notes["watched"]


def watch(
    case: Case,
    *,
    steps: int = STEPS,
    noise: int = 0,
    scale: float | None = None,
    make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    **options: Any,
) -> Watched:
    """Train in a plain loop with clipped gradients, and note what happens.

    noise: another state of the generators, outside of the forwards. scale: of a GradScaler. make:
    the optimizer. options: of the passes that have them; `period` is 2.
    """
    plain, model = case.model(), case.model()
    before = anatomy(model)
    alone, ours = [_drawn(3 + noise)], []
    _seed(3 + noise)
    apply(model, case.passes(**({"period": 2} | options)))
    ours.append(_drawn())
    losses = _first(case, plain, alone), _first(case, model, ours)
    adjoint = _adjoint(model, plain)
    keys = list(plain.state_dict()), list(model.state_dict())
    first, start = applied(model).dispatch.captures, weights(model)
    for each in (plain, model):
        each.zero_grad()
    loop = _Loop(case, plain, make, scale)
    for number in range(min(steps, 2)):
        loop.step(number, noise, alone)
    loop = _Loop(case, model, make, scale)
    made = [loop.watched_step(number, noise, ours) for number in range(steps)]
    now, last = applied(model).dispatch.captures, weights(model)
    remove(model)
    after, removed = anatomy(model), weights(model)
    for each in (plain, model):
        case.loss(each).backward()  # every gradient flows again, and no hook objects
    return Watched(
        losses=losses,
        drawn=(alone, ours),
        keys=keys,
        adjoint=adjoint,
        start=start,
        steps=made,
        captures=(first, now),
        anatomy=(before, after),
        last=(last, removed),
        reached=(_reached(plain), _reached(model)),
    )


class _Noted:
    """The ending of a round, with a note of it taken."""

    def __init__(self, ending: Any, note: Callable[[], None]) -> None:
        self.ending, self.note = ending, note

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ending, name)

    def __call__(self, *args: Any) -> None:
        self.ending(*args)
        self.note()


class _Loop:
    """A plain loop around a model."""

    def __init__(
        self,
        case: Case,
        model: nn.Module,
        make: Callable[..., torch.optim.Optimizer],
        scale: float | None,
    ) -> None:
        self.case, self.model = case, model
        self.optimizer = make(model.parameters(), lr=1e-3, weight_decay=0.1)
        self.scaler = torch.amp.GradScaler(
            "cpu", init_scale=scale or 1.0, enabled=scale is not None
        )

    def step(self, number: int, noise: int, drawn: list[Drawn]) -> None:
        _seed(number)  # the same dropout masks in all runs
        self.scaler.scale(self.case.loss(self.model, number)).backward()
        drawn.append(_drawn())
        _seed(1000 * noise + number)
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        drawn.append(_drawn())
        self.optimizer.zero_grad()

    def watched_step(self, number: int, noise: int, drawn: list[Drawn]) -> Step:
        """Make a step of a model that is rewritten, and note what it did."""
        if number == 0:
            self.moved = Moved(self.model, self.optimizer)
            # Before the clock acts on a step, and begins a new round.
            self.optimizer.register_step_post_hook(self.moved.move)
            for method in applied(self.model).decision.methods:
                ending = getattr(method, "ending", None)
                if ending is not None:  # what ends a round may move coordinates by itself
                    method.ending = _Noted(ending, self.moved.move)  # pyright: ignore
        active = [c for c in coordinates(self.model) if c.active]
        self.step(number, noise, drawn)
        live = {id(c.parameter) for c in coordinates(self.model) if c.active}
        held = {id(p) for p, state in self.optimizer.state.items() if state}
        return Step(
            trained={c.weight for c in active},
            weights=weights(self.model),
            expected={name: value.clone() for name, value in self.moved.weights.items()},
            held=len(held),
            stray=not held <= live & {id(c.parameter) for c in active},
            left=[n for n, p in self.model.named_parameters() if p.grad is not None],
        )


def _first(case: Case, model: nn.Module, drawn: list[Drawn]) -> Tensor:
    _seed(3)
    loss = case.loss(model)
    loss.backward()
    drawn.append(_drawn())
    return loss.detach()


def _adjoint(model: nn.Module, plain: nn.Module) -> Adjoint:
    full = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    generator = torch.Generator().manual_seed(0)
    active: dict[int, list[Any]] = {}
    beside = named(applied(model).decision.additions)
    for c in coordinates(model):
        if c.active and c.weight not in beside:
            active.setdefault(id(c.parameter), []).append(c)
    off = {}
    for shared in active.values():
        parameter, names = shared[0].parameter, [c.weight for c in shared]
        e = torch.randn(parameter.shape, generator=generator)
        left = sum(float((full[c.weight].double() * c.expand(e).double()).sum()) for c in shared)
        scale = sum(float(full[n].norm()) ** 2 for n in names) ** 0.5 * float(e.norm())
        if parameter.grad is None:
            off[names[0]] = float("inf")
        else:
            right = float((parameter.grad.double() * e.double()).sum())
            off[names[0]] = max(off.get(names[0], 0.0), abs(left - right) / max(scale, 1e-30))
    listed = {id(p) for p in model.parameters()}
    found = coordinates(model)
    alone = [c for c in found if not c.active and id(c.parameter) not in active]
    return Adjoint(
        off=off,
        untrained=[c.weight for c in alone if c.parameter.grad is not None],
        unlisted=[c.weight for c in found if id(c.parameter) not in listed],
    )


def _reached(model: nn.Module) -> set[str]:
    return {name for name, parameter in own(model).items() if parameter.grad is not None}


def _seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)


def _drawn(seed: int | None = None) -> Drawn:
    """Return what the generators give next, or after a seed."""
    if seed is not None:
        _seed(seed)
    return torch.rand(4).tolist(), random.random()
