"""Rounds: every `period` optimizer steps, another set of units is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from surgery.contract.method import Method, Run
from surgery.errors import ConflictError, OptionError, TargetError, listed
from surgery.weights.coordinate import Coordinate, Precision, coordinate_of
from surgery.weights.gradients import norms
from surgery.weights.targets import Targets, blocks, select


class Scores(Protocol):
    """What a sampling pass learns from the gradients of the active units."""

    def observe(self, squared: dict[str, float]) -> None:
        """Take the mean squared gradient entry of each active unit, for one optimizer step."""

    def close(self) -> None:
        """Update the scores with what was observed in the round that ends now."""


class Ending(Protocol):
    """What a sampling pass does to the weights of a round when it ends, by their optimizer state.

    It changes the weights themselves, so no other pass may train them through coordinates.
    """

    def check(self, optimizer: Optimizer) -> None:
        """Raise OptimizerError if an optimizer lacks the state that this needs."""

    def conflict(self, weight: str) -> str:
        """Return why no other pass can train a weight, as sentences that end with the fix."""
        ...

    def __call__(self, optimizer: Optimizer, leaving: Sequence[Coordinate]) -> None:
        """Change the weights in place."""


class Learned(Protocol):
    """What a sampling pass has learned or drawn so far and cannot draw again."""

    def state(self) -> dict[str, Any]:
        """Return it: numbers and strings, nested by name."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""


@dataclass(eq=False, kw_only=True)
class Rounds(Method):
    """The state of a sampling pass: which units are trained, and when that changes.

    units: the sets of coordinates that are drawn, by name. period: the number of optimizer steps in
    a round. draw: a function that takes the number of a round and returns the names of the units to
    train in it. draw(0) is called at once, in `start` (by `plan` on tensors without data); a
    resumed run does not draw its current round again. always: coordinates that are trained in every
    round. scores: the scores of the units, from their gradients. learned: what a resumed run needs,
    by name. ending: see `Ending`. total: the number of the model's parameters.
    """

    name: str
    units: dict[str, tuple[Coordinate, ...]]
    period: int
    draw: Callable[[int], Sequence[str]]
    always: tuple[Coordinate, ...] = ()
    scores: Scores | None = None
    learned: Mapping[str, Learned] = field(default_factory=dict)
    ending: Ending | None = None
    total: int
    round: int = 0
    steps: int = 0  # optimizer steps made in this round
    active: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        if not isinstance(self.learned, Mapping) or {"round", "steps", "active"} & {*self.learned}:
            raise OptionError(
                f"{self.name}: learned={self.learned!r} must map names to objects with state() and "
                'restore(state), such as {"scores": scores}. The names "round", "steps" and '
                '"active" are taken.'
            )
        for each in self.always:
            each.active = True
        self._activate(self._drawn(0))
        # If everything fits into one round, there is nothing to choose and no score to measure.
        watched = self.scores is not None and len(self.active) < len(self.units)
        for unit in self.units.values():
            for each in unit:
                each.watched = watched

    @property
    def coordinates(self) -> Sequence[Coordinate]:
        return [*(each for unit in self.units.values() for each in unit), *self.always]

    def adopt(self, coordinate: Coordinate) -> bool:
        for name, unit in self.units.items():
            own = [each for each in unit if each.weight == coordinate.weight]
            if own and self.ending is not None:
                raise ConflictError(f"{self.name}: {self.ending.conflict(coordinate.weight)}")
            if own and own[0].index is None:
                coordinate.active, coordinate.watched = name in self.active, own[0].watched
                self.units[name] = tuple(coordinate if each is own[0] else each for each in unit)
                return True
        return False

    def check(self, optimizer: Optimizer) -> None:
        if self.ending is not None:
            self.ending.check(optimizer)

    def after_step(self, run: Run) -> None:
        self.steps += 1
        scores = self.scores if len(self.active) < len(self.units) else None
        if scores is not None:
            scores.observe(self._squared(run.loss_scale))
        if self.steps < self.period:
            return
        if scores is not None:
            scores.close()
        before = self.active
        leaving = self._of(before)
        if self.ending is not None:
            # Not all that ever stepped: one that was replaced may still be alive, with its state.
            for optimizer in run.driving:
                self.ending(optimizer, leaving)
        self.round += 1
        self.steps = 0
        self._activate(self._drawn(self.round))
        kept = frozenset() if self.ending is not None else before & self.active
        run.forget(self._of((before | self.active) - kept))

    def state(self) -> dict[str, Any]:
        counters = {"round": self.round, "steps": self.steps, "active": sorted(self.active)}
        return counters | {name: each.state() for name, each in self.learned.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.round, self.steps = state["round"], state["steps"]
        self._activate(state["active"])
        for name, each in self.learned.items():
            each.restore(state[name])

    def lines(self) -> Iterable[tuple[str, str]]:
        share = sum(p.size for p in self._of(self.active)) / self.total
        of = f"{len(self.active)} of {len(self.units)} units"
        yield "trained now", f"{share:.2%} of {self.total:,} parameters, {of}"
        if self.active:
            yield "in this round", f"{listed(sorted(self.active), 3)}"
        always = sum(each.numel for each in self.always)
        if always:
            yield "trained always", f"{always:,} parameters, {always / self.total:.2%}"
        candidates = sum(each.size for unit in self.units.values() for each in unit)
        frozen = self.total - candidates - always
        if frozen:
            yield "never trained", f"{frozen:,} parameters, {frozen / self.total:.2%}"
        yield "round", f"{self.round}, step {self.steps} of {self.period}"

    def _of(self, names: Iterable[str]) -> list[Coordinate]:
        return [each for name in sorted(names) for each in self.units[name]]

    def _drawn(self, round: int) -> Sequence[str]:
        names = self.draw(round)
        strange = [name for name in names if name not in self.units]
        if strange or not names:
            what = f"{listed(strange)}, which are not its units" if strange else "nothing"
            raise OptionError(
                f"{self.name}: draw({round}) named {what}. Its units are {listed(self.units)}."
            )
        return names

    def _activate(self, names: Sequence[str]) -> None:
        self.active = frozenset(names)
        for name, unit in self.units.items():
            for each in unit:
                each.active = name in self.active

    def _squared(self, scale: float) -> dict[str, float]:
        """Return the mean squared gradient entry of each active unit, free of the loss scale."""
        seen = [(name, p) for name in sorted(self.active) for p in self.units[name]]
        own = [p.norm if p.norm is not None else torch.zeros(()) for _, p in seen]
        several = len({norm.device for norm in own}) > 1
        stacked = torch.stack([norm.to("cpu") for norm in own] if several else own)
        squared = (stacked.double() / scale).square().tolist()  # one synchronisation a step
        sums = dict.fromkeys(self.active, 0.0)
        sizes = dict.fromkeys(self.active, 0)
        for (name, each), value in zip(seen, squared, strict=True):
            sums[name] += value
            sizes[name] += each.size  # E ||dB||^2 = ||dW||^2 for a mapped coordinate B
            each.norm = None
        return {name: sums[name] / sizes[name] for name in self.active}


def whole_blocks(
    model: nn.Module, targets: Targets, name: str, precision: Precision = "auto"
) -> tuple[dict[str, tuple[Coordinate, ...]], list[str]]:
    """Return the model's blocks as units, and the names of the parameters outside of the blocks.

    A unit has all trainable parameters of a block that `targets` names. precision: see
    `coordinate_of`. Raises TargetError if the blocks have no such parameter.
    """
    allowed = {n for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    if targets is not None:
        allowed &= set(select(model, targets, "targets"))
    units: dict[str, tuple[Coordinate, ...]] = {}
    for block, names in blocks(model).items():
        own = [coordinate_of(model, n, precision=precision) for n in names if n in allowed]
        if own:
            units[block] = tuple(own)
    if not units:
        raise TargetError(
            f"{name}: no trainable parameter in the repeated blocks of this model. Check targets=, "
            "and that requires_grad was not switched off before surgery.apply."
        )
    inside = {each.weight for unit in units.values() for each in unit}
    return units, [n for n, _ in model.named_parameters() if n in allowed - inside]


def weight_norms(coordinates: Iterable[Coordinate]) -> list[float]:
    """Return the norm of what each coordinate stands for: a weight, or a block of one.

    For a mapped coordinate, it is the norm of the coordinate itself. On tensors without data: 1.0.
    """
    parameters = [
        c.parameter.detach() if c.mapped else c.part(c.owner.get_parameter(c.held_as))
        for c in coordinates
    ]
    if any(p.is_meta for p in parameters):
        return [1.0 for _ in parameters]
    return [float(norm) for norm in norms(parameters)]
