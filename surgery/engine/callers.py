"""Who is stepping: what calls an optimizer, its loss scale, learning rate and state."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch.amp import GradScaler
from torch.optim import Adagrad

from surgery.errors import OptimizerError
from surgery.weights.coordinate import Coordinate

_CALLERS = 18  # frames from here to GradScaler.step: 6 in torch, 10 under accelerate


def calls() -> Iterator[FrameType]:
    """Return the calls under way, from the one that asks outwards."""
    frame = inspect.currentframe()
    while frame is not None and (frame := frame.f_back) is not None:
        yield frame


def loss_scale_now() -> float:
    """Return the scale of the GradScaler that is calling `optimizer.step()`, else 1.

    The scaler does not announce itself to the optimizer, and the norms were measured right after
    backward, where gradients are still scaled; so look up who is calling.
    """
    for frame in itertools.islice(calls(), _CALLERS):
        # Of our own frame the locals would hold itself, and with it all those that call.
        if frame.f_code.co_name == "step":
            caller = frame.f_locals.get("self")
            if isinstance(caller, GradScaler):
                return caller.get_scale()
    return 1.0


def rate_of(optimizer: Any, group: dict[str, Any]) -> float:
    """Return the learning rate of a group, by which decays are multiplied."""
    if "lr" not in group:
        raise OptimizerError(
            f"{type(optimizer).__name__} has no learning rate (lr) in its param_groups, which "
            "decays of the pass are multiplied by. Use weight_decay=0 and prox=0."
        )
    return float(group["lr"])


def forget_state(optimizer: Any, coordinate: Coordinate) -> None:
    """Free what an optimizer keeps for a coordinate; of one that begins, it is as new."""
    parameter = coordinate.parameter
    optimizer.state.pop(parameter, None)
    if not coordinate.drawn or not isinstance(optimizer, Adagrad):
        return
    for group in optimizer.param_groups:  # the only one of torch's that does not make it in step
        if any(each is parameter for each in group["params"]):
            start = group["initial_accumulator_value"]
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32),
                "sum": torch.full_like(parameter, start, memory_format=torch.preserve_format),
            }
