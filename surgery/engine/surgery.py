"""One applied surgery: what was decided, and who serves it."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

from torch import nn

from surgery.compat import fsdp, modules
from surgery.engine.backward import Backward
from surgery.engine.binding import Binding
from surgery.engine.clock import Clock
from surgery.engine.coverage import Coverage
from surgery.engine.decide import Decision
from surgery.engine.dispatch import Dispatch
from surgery.engine.exhausted import hear_steps
from surgery.engine.finding import disown, own_later
from surgery.engine.finding import own as own_modules
from surgery.engine.rewrite import logged
from surgery.weights.table import BEFORE_SAVED, TABLE, table_of


class Surgery:
    """What one `surgery.apply` keeps: plain Python state beside the model.

    decision: what it is. dispatch: its forwards. coverage: what these have read. backward: its
    backwards. clock: its steps. binding: the tensors that its coordinates are on. Each of them
    alone writes what it holds. expected: bytes at the peak of a step and between forward and
    backward, if they were predicted.
    """

    expected: tuple[int | None, int | None] = (None, None)

    def __init__(self, decision: Decision) -> None:
        self.decision = decision
        self.coverage = Coverage(decision=decision)
        self.backward = Backward(decision=decision)
        self.binding = Binding(decision=decision, backward=self.backward)
        self.clock = Clock(decision=decision, backward=self.backward, coverage=self.coverage)
        self.dispatch = Dispatch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        own_later(self)

    def install(self) -> None:
        """Carry the decision out. An error leaves the model as it was."""
        logged()
        model, sites = self.decision.model, self.decision.sites
        try:
            for each in self.decision.additions:
                each.put_on(model)
            own = [each for site in sites if not site.whole for each in site.coordinates]
            if sites:
                trained = {site.name for site in sites}
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(name in trained)
                through = {id(site.current()) for site in sites if not site.whole}
                known = model.named_parameters(remove_duplicate=False)  # tied: each of its names
                fsdp.leave_out_of_ddp(model, [name for name, p in known if id(p) in through])
            if own:
                model.add_module(TABLE, table_of(own))
            self.dispatch.install()
            self.bind()
            own_modules(self)
            hear_steps()
        except BaseException:
            self.uninstall()
            raise

    def uninstall(self) -> None:
        """Take everything out; the weights keep what they have learned."""
        disown(self)
        self.clock.stop()
        self.binding.release()
        self.dispatch.uninstall()
        modules.take_child(self.decision.model, TABLE)
        fsdp.take_back_from_ddp(self.decision.model)
        for each in self.decision.additions:
            each.take_off(self.decision.model)
        for parameter, required in self.flags():
            parameter.requires_grad_(required)

    def bind(self, forward: bool = False) -> None:
        """Be on the model's present parameters, and hear optimizers. forward: see `Binding`."""
        self.binding.bind(self.clock.step, forward, self.clock.stepping)
        self.clock.listen()
        table = modules.child(self.decision.model, TABLE)
        if table is not None and table not in BEFORE_SAVED:
            BEFORE_SAVED[table] = partial(_keep_up, weakref.ref(self))

    def keep_up(self) -> None:
        """Let weights be what was made of their coordinates by hand, or inside of a step."""
        self.binding.keep_up(self.clock.step, self.clock.stepping)

    def flags(self) -> list[tuple[nn.Parameter, bool]]:
        """Return the model's own parameters, each with its requires_grad before apply."""
        found = [(modules.held(owner, key), flag) for owner, key, flag in self.decision.flags]
        once: dict[int, Any] = {id(p): (p, flag) for p, flag in found if p is not None}
        return list(once.values())


def _keep_up(surgery: weakref.ref[Surgery]) -> None:
    alive = surgery()
    if alive is not None and not alive.clock.stepping:
        alive.keep_up()
