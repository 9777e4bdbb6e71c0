"""The clock: torch's global optimizer hooks tell that a step happens, whoever's optimizer it is."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from surgery.engine.backward import Backward
from surgery.engine.coverage import Coverage
from surgery.engine.decide import Decision
from surgery.engine.guards import around, check_fresh, check_membership, only_makes_state
from surgery.errors import OptimizerError
from surgery.weights import shards
from surgery.weights.carry import carry
from surgery.weights.coordinate import Coordinate, unique
from surgery.weights.gradients import finite

_CALLERS = 18  # frames from here to GradScaler.step: 6 in torch, 10 under accelerate

LISTENING: weakref.WeakSet[Clock] = weakref.WeakSet()


@dataclass(eq=False, kw_only=True)
class Clock:
    """The steps of one surgery: the `Run` that its passes see.

    skipped: steps whose gradients were NaN or infinite. forwards: training forwards since the last
    step. refused: the step under way is not made. before: mapped coordinates before it. stepped:
    parameters that some optimizer has stepped, while others have yet to.
    """

    decision: Decision
    backward: Backward
    coverage: Coverage
    step: int = 0
    skipped: int = 0
    forwards: int = 0
    loss_scale: float = 1.0
    rehearsal: bool = False
    refused: bool = False
    optimizers: weakref.WeakSet[Optimizer] = field(default_factory=weakref.WeakSet)
    driving: list[Optimizer] = field(default_factory=list)
    stepped: set[int] = field(default_factory=set)
    before: dict[int, Tensor] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        fresh = {"stepped": set(), "driving": [], "before": {}}
        return {k: v for k, v in (self.__dict__ | fresh).items() if k != "optimizers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"optimizers": weakref.WeakSet()}

    @property
    def model(self) -> nn.Module:
        return self.decision.model

    def resume(self, step: int, skipped: int = 0) -> None:
        """Go on from where a run was."""
        self.step, self.skipped = step, skipped

    def forward(self) -> None:
        """Note that a training forward begins."""
        self.forwards += not self.rehearsal

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Let the forwards inside leave no trace."""
        self.rehearsal = True
        try:
            yield
        finally:
            self.rehearsal = False

    def listen(self) -> None:
        """Hear the steps of optimizers from now on."""
        LISTENING.add(self)

    def stop(self) -> None:
        """Hear them no more."""
        LISTENING.discard(self)

    def begin(self, optimizer: Optimizer, loss_scale: float) -> None:
        """Check an optimizer at its first step; drop the gradients of a step that is not finite."""
        held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        if self.backward.first is not None and self._steps_us(held):
            raise OptimizerError(
                f"{type(optimizer).__name__} steps inside of a backward, before the gradients of "
                "all that is trained are there. Step after it; gradients are small under most "
                "passes. (LOMO: see surgery.step.)"
            )
        self.refused = not self.forwards and only_makes_state(optimizer)
        if self.refused:
            return
        coordinates, methods = self.decision.coordinates, self.decision.methods
        if optimizer not in self.optimizers:
            if not self._steps_us(held):
                return
            check_membership(coordinates, optimizer, held)
            if not self.step:
                check_fresh(coordinates, optimizer)
            for method in methods:
                method.check(optimizer)
            self.optimizers.add(optimizer)
        if (
            not self.coverage.complete
            and any(p.grad is not None for p in held.values())
            and not any(each.parameter.grad is not None for each in coordinates)
        ):
            raise around("no gradient has reached a coordinate")
        for method in methods:
            method.before_step()
        self.loss_scale = loss_scale
        self.refused = not finite([c for c in unique(coordinates) if id(c.parameter) in held])
        if self.refused:
            self.skipped += 1
            for parameter in held.values():
                parameter.grad = None
            return
        self.before = {
            id(each.parameter): each.parameter.detach().clone()
            for each in unique(coordinates)
            if each.mapped and each.active and id(each.parameter) in held
        }

    def end(self, optimizer: Optimizer) -> None:
        """Carry the step into the weights; count it once all coordinates have been stepped."""
        if optimizer not in self.optimizers or self.refused:
            return
        self._carry(optimizer)
        self.driving.append(optimizer)
        self.stepped |= {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not {id(each.parameter) for each in self.decision.coordinates} <= self.stepped:
            return
        self.stepped.clear()
        self.step, self.forwards = self.step + 1, 0
        for method in self.decision.methods:
            method.after_step(self)
        self.driving.clear()

    def forget(self, coordinates: Iterable[Coordinate]) -> None:
        """Free the optimizer state and the gradients of coordinates that leave or enter."""
        for each in coordinates:
            each.parameter.grad = None
            each.norm = None
            for optimizer in self.optimizers:
                optimizer.state.pop(each.parameter, None)

    def _steps_us(self, held: dict[int, Tensor]) -> bool:
        return any(id(parameter) in held for parameter in self.model.parameters())

    def _carry(self, optimizer: Optimizer) -> None:
        if not self.before:
            return
        rates = {id(p): float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}
        moved: dict[int, tuple[Tensor, Tensor]] = {}
        for each in unique(self.decision.coordinates):
            key, now = id(each.parameter), each.parameter.detach()
            if key not in self.before or each.mapped is None:
                continue
            if each.mapped.prox:
                now.mul_(1.0 - rates[key] * each.mapped.prox)
            moved[key] = (shards.whole(self.before[key]), shards.whole(now))
        for site in self.decision.sites:
            for each in site.coordinates:
                key, weight = id(each.parameter), site.weight()
                if key in moved and each.mapped and weight is not None and not site.unused:
                    decay = rates[key] * each.mapped.weight_decay
                    carry(each, weight, *moved[key], self.step, decay)
        self.before = {}


# -- torch's hooks ---------------------------------------------------------------------------------


def before_step(optimizer: Optimizer, args: Any = (), kwargs: Any = None) -> None:
    """Run what is due before `optimizer.step()`."""
    if LISTENING:
        scale = _loss_scale()
        for clock in list(LISTENING):
            clock.begin(optimizer, scale)


def after_step(optimizer: Optimizer, args: Any = (), kwargs: Any = None) -> None:
    """Run what is due after `optimizer.step()`."""
    for clock in list(LISTENING):
        clock.end(optimizer)


def _loss_scale() -> float:
    """Return the scale of the GradScaler that is calling `optimizer.step()`, else 1.

    The scaler does not announce itself to the optimizer, and the norms were measured right after
    backward, where gradients are still scaled; so look up who is calling.
    """
    frame = inspect.currentframe()
    for _ in range(_CALLERS):
        if frame is None:
            break
        caller = frame.f_locals.get("self")
        if isinstance(caller, GradScaler):
            return caller.get_scale()
        frame = frame.f_back
    return 1.0


register_optimizer_step_pre_hook(before_step)
register_optimizer_step_post_hook(after_step)
