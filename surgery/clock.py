"""The clock: torch's global optimizer hooks tell that a step happens, whoever's optimizer it is."""

from __future__ import annotations

import sys
from typing import Any

from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from surgery.state import LIVE

_CALLERS = 16  # frames between our hook and GradScaler.step: 4 in torch, 8 under accelerate


def before_step(optimizer: Optimizer, args: Any = (), kwargs: Any = None) -> None:
    """Run what is due before `optimizer.step()`."""
    if LIVE:
        scale = _loss_scale()
        for surgery in list(LIVE):
            surgery.before_step(optimizer, scale)


def after_step(optimizer: Optimizer, args: Any = (), kwargs: Any = None) -> None:
    """Run what is due after `optimizer.step()`."""
    for surgery in list(LIVE):
        surgery.after_step(optimizer)


def _loss_scale() -> float:
    """Return the scale of the GradScaler that is calling `optimizer.step()`, else 1.

    The scaler does not announce itself to the optimizer, and the norms were measured right after
    backward, where gradients are still scaled; so look up who is calling.
    """
    frame = sys._getframe(2)
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
