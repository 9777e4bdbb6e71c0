"""Hearing of steps: torch's global optimizer hooks tell of each, whoever's optimizer it is."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from surgery.compat.optimizers import hear_first
from surgery.engine.callers import calls, loss_scale_now
from surgery.engine.clock import LISTENING


def before_step(optimizer: Optimizer, args: Any = (), kwargs: Any = None) -> Any:
    """Run what is due before `optimizer.step()`; return its arguments if they shall be others."""
    if not LISTENING:
        return None
    where = next(itertools.islice(calls(), 1, None))  # the step: an error ends it, not its caller
    scale, listening = loss_scale_now(), list(LISTENING)
    closure = (kwargs or {}).get("closure") or (args[1] if len(args) > 1 else None)
    for clock in listening:
        clock.begin(optimizer, where, scale, callable(closure))
    if any(clock.is_under_way(optimizer) for clock in listening):
        hear_first(optimizer, stepped)
    if not callable(closure):
        return None

    def computed() -> Any:
        with torch.enable_grad():
            found = closure()
        for clock in listening:
            clock.computed(optimizer)
        return found

    given = {k: v for k, v in (kwargs or {}).items() if k != "closure"}
    return (args[0], computed, *args[2:]), given


def stepped(optimizer: Optimizer, args: Any = (), kwargs: Any = None) -> None:
    """Run what is due before the hooks of an optimizer's own."""
    for clock in list(LISTENING):
        clock.carry(optimizer)


def after_step(optimizer: Optimizer, args: Any = (), kwargs: Any = None) -> None:
    """Run what is due after `optimizer.step()`."""
    for clock in list(LISTENING):
        clock.end(optimizer)


register_optimizer_step_pre_hook(before_step)
register_optimizer_step_post_hook(after_step)
