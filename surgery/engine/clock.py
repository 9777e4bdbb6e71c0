"""The clock: what is due before and after each step of an optimizer, and counting them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from surgery.compat import modules
from surgery.engine.backward import Backward
from surgery.engine.callers import calls, forget_state, rate_of
from surgery.engine.coverage import Coverage
from surgery.engine.decide import Decision
from surgery.engine.guards import (
    around,
    check_fresh,
    check_handed,
    check_held,
    check_membership,
    check_resumed,
    only_makes_state,
    warn_by_hand,
)
from surgery.engine.nested import Nested
from surgery.engine.unmoved import Unmoved
from surgery.errors import OptimizerError
from surgery.weights import copies
from surgery.weights.coordinate import Coordinate, Whole, unique
from surgery.weights.gradients import finite, norms
from surgery.weights.table import TABLE

_BY_HAND = 5
LISTENING: weakref.WeakSet[Clock] = weakref.WeakSet()


@dataclass(eq=False, kw_only=True)
class Clock:
    """The steps of one surgery: the `Run` that its passes see.

    skipped: steps whose gradients were NaN or infinite. forwards: training forwards since the last
    step. idle: those that have used nothing that was trained. under_way: optimizers whose steps
    are, and where these were called, the outermost first: one may step another. refused: the step
    under way is not made; None: its closure has yet to say. stepped: parameters that some optimizer
    has stepped, while others have yet to.
    """

    decision: Decision
    backward: Backward
    coverage: Coverage
    step: int = 0
    skipped: int = 0
    forwards: int = 0
    idle: int = 0
    loss_scale: float = 1.0
    rehearsal: bool = False
    refused: bool | None = False
    optimizers: weakref.WeakKeyDictionary[Optimizer, frozenset[str]] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    under_way: list[tuple[Optimizer, FrameType]] = field(default_factory=list)
    driving: list[Optimizer] = field(default_factory=list)
    by_hand: int = 0  # backwards after which parameters were written before any step
    carried: bool = False  # whether the step under way is in the weights already
    nested: Nested = field(default_factory=Nested)
    stepped: set[int] = field(default_factory=set)
    unmoved: Unmoved = field(default_factory=Unmoved)

    def __getstate__(self) -> dict[str, Any]:
        fresh = {"stepped": set(), "driving": [], "under_way": [], "refused": False}
        return {k: v for k, v in (self.__dict__ | fresh).items() if k != "optimizers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"optimizers": weakref.WeakKeyDictionary()}
        self.listen()  # the first thing that a copy does may be a step, with a closure

    @property
    def model(self) -> nn.Module:
        return self.decision.model

    def resume(self, step: int, skipped: int = 0) -> None:
        """Go on from where a run was."""
        self.step, self.skipped, self.forwards = step, skipped, 0
        self.stepped.clear()
        self.driving.clear()

    def forward(self) -> None:
        """Note that a training forward begins."""
        self.forwards += not self.rehearsal
        self.by_hand += self.backward.written()
        if self.by_hand == _BY_HAND and self.backward.watching:
            self.backward.watching = False
            warn_by_hand(_BY_HAND)

    def note_idle(self) -> None:
        """Note that a training forward has used nothing that is being trained."""
        self.idle += not self.rehearsal

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

    @property
    def stepping(self) -> bool:
        """Whether an optimizer's step is under way; one that an error has ended is forgotten."""
        if self.under_way:
            now = set(map(id, calls()))  # a set of frames would hold the one that it is in
            self.under_way = [each for each in self.under_way if id(each[1]) in now]
        return bool(self.under_way)

    def begin(
        self, optimizer: Optimizer, where: FrameType, loss_scale: float, closure: bool
    ) -> None:
        """Check an optimizer at its first step; drop the gradients of a step that is not finite.

        where: what calls the step. closure: whether it computes its gradients, see `computed`.
        """
        held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        if optimizer not in self.optimizers and not self._steps_us(held):
            return  # another model's, whose step may be under way in another thread
        if self.stepping:  # one optimizer around another
            if self._steps_us(held):
                self.optimizers[optimizer] = frozenset()
                self.under_way.append((optimizer, where))
            return
        if self.backward.first is not None and self._steps_us(held):
            raise OptimizerError(
                f"{type(optimizer).__name__} steps inside of backward, before all gradients have "
                "been computed. Step after backward: under most passes, gradients take little "
                "memory. (For LOMO, see surgery.step.)"
            )
        self.refused = not self.forwards and not closure and only_makes_state(optimizer)
        if self.refused:
            return
        check_handed(self.backward.handed, optimizer, held)
        coordinates, methods = self.decision.coordinates, self.decision.methods
        if optimizer not in self.optimizers:
            check_membership(coordinates, optimizer, held)
            if not self.step:
                check_fresh(coordinates, optimizer)
                check_resumed(optimizer)
            for method in methods:
                method.check(optimizer)
            names = frozenset(n for n, p in self._steppable().items() if id(p) in held)
            self.optimizers[optimizer] = names
            for each in coordinates:
                if not each.drawn:  # some optimizers make the state of all when they are built
                    optimizer.state.pop(each.parameter, None)
        else:
            check_held(self._steppable(), optimizer, held, self.optimizers[optimizer])
        self.loss_scale = loss_scale
        copies.keep_all_up(self.decision.sites, self.step)  # written since the backward
        self.nested.begin(optimizer, self.step)
        self.carried = False
        self.under_way.append((optimizer, where))
        if closure:
            self.refused = None
        else:
            self._take_gradients(held)

    def computed(self, optimizer: Optimizer) -> None:
        """Look at the gradients that a closure has computed inside of a step."""
        if not self.is_under_way(optimizer):
            return
        held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        made = self.refused is False
        self._take_gradients(held)
        if made:  # at an earlier point of the same step
            self.refused = False

    def _take_gradients(self, held: dict[int, Tensor]) -> None:
        """See that the gradients of a step are there and finite; else take them away."""
        coordinates, methods = self.decision.coordinates, self.decision.methods
        self.backward.take_by_hand()
        if (
            not self.coverage.complete
            and any(p.grad is not None for p in held.values())
            and not any(each.parameter.grad is not None for each in coordinates)
        ):
            raise around("no gradient has reached a coordinate")
        for method in methods:
            method.before_step(self)
        live = unique(c for c in coordinates if c.active)  # of those that share one, some may rest
        self.refused = not finite([c for c in live if id(c.parameter) in held])
        if self.refused:
            for parameter in held.values():
                parameter.grad = None
            return
        self.unmoved.before(held.values(), self.step)
        by_hand = [(c, g) for c in coordinates if (g := self._unmeasured(c)) is not None]
        for (each, _), norm in zip(by_hand, norms([g for _, g in by_hand]), strict=True):
            each.norm = norm

    def _unmeasured(self, coordinate: Coordinate) -> Tensor | None:
        """Return the gradient of a coordinate that has got one past every backward of ours."""
        watched = coordinate.watched and coordinate.active and coordinate.norm is None
        return coordinate.parameter.grad if watched else None

    def carry(self, optimizer: Optimizer) -> None:
        """Carry the step into the weights, before hooks on the optimizer see these."""
        if self.under_way and optimizer is self.under_way[0][0] and self.refused is False:
            self._carry(optimizer)
            self.carried = True

    def end(self, optimizer: Optimizer) -> None:
        """Carry the step into the weights; count it once all coordinates have been stepped."""
        if not self.is_under_way(optimizer):
            return
        self.driving.append(optimizer)
        self.backward.used()
        if optimizer is not self.under_way[0][0]:
            self.under_way.pop()
            self.nested.inside(self.decision.coordinates)
            return
        self.under_way.clear()
        if self.refused is not False:
            self.skipped += 1
            self.driving.clear()
            return
        for each in self.driving:
            self.stepped |= {id(p) for group in each.param_groups for p in group["params"]}
        self.unmoved.after()
        if self.carried:
            copies.keep_all_up(self.decision.sites, self.step)  # written by hooks
        else:
            self._carry(optimizer)
        if not {id(each.parameter) for each in self.decision.coordinates} <= self.stepped:
            return
        self.stepped.clear()
        self.step, self.forwards = self.step + 1, 0
        for method in self.decision.methods:
            method.after_step(self)
        for site in self.decision.sites:  # passes take mapped coordinates back to zero
            for each in site.coordinates:
                if each.mapped:
                    copies.accept(site, each, self.step)
        self.driving.clear()

    def forget(self, coordinates: Iterable[Coordinate]) -> None:
        """Free the optimizer state and the gradients of coordinates that leave or enter."""
        for each in coordinates:
            each.parameter.grad = None
            each.norm = None
            for optimizer in self.optimizers:
                forget_state(optimizer, each)
        table = modules.child(self.model, TABLE)
        copies.settle(table, self.decision.sites, self.step)

    def is_under_way(self, optimizer: Optimizer) -> bool:
        """Whether this optimizer's step is under way, and steps this model."""
        return any(each is optimizer for each, _ in self.under_way)

    def _steps_us(self, held: dict[int, Tensor]) -> bool:
        return any(id(parameter) in held for parameter in self.model.parameters())

    def _steppable(self) -> dict[str, Tensor]:
        """Return what optimizers step, by name: under exact passes alone, the weights."""
        own: dict[str, Tensor] = {c.name: c.parameter for c in self.decision.coordinates}
        return own or dict(self.model.named_parameters())

    def _carry(self, optimizer: Optimizer) -> None:
        others = [each for each in self.driving if each is not optimizer]
        self.nested.check(optimizer, self.decision.sites, others)
        for method in self.decision.methods:
            method.stepped(optimizer, self)
        groups = {id(p): g for g in optimizer.param_groups for p in g["params"]}
        if all(isinstance(each.rule, Whole) for each in self.decision.coordinates):
            return
        for each in unique(self.decision.coordinates):
            group = groups.get(id(each.parameter))
            if group is not None and each.active and each.mapped and each.mapped.prox:
                rate = rate_of(optimizer, group)
                each.parameter.detach().mul_(1.0 - rate * each.mapped.prox)
        taken: dict[int, Tensor] = {}
        for site in self.decision.sites:
            for each in site.coordinates:
                group = groups.get(id(each.parameter))
                if group is None or not each.active or site.weight() is None:
                    continue
                decay = each.mapped.weight_decay if each.mapped else 0.0
                decay = decay and decay * rate_of(optimizer, group)
                copies.write(site, each, self.step, decay, taken)
