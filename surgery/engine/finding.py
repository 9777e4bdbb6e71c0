"""Finding the surgery of a model again, whatever has been put around its forward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from surgery.errors import ModelError

if TYPE_CHECKING:
    from surgery.engine.surgery import Surgery


class Forward:
    """What stands in the place of `model.forward` and knows its surgery."""

    surgery: Surgery


def surgery_of(model: nn.Module) -> Surgery | None:
    """Return the surgery that was applied to this model, or to a model inside of it."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        while forward is not None and not isinstance(forward, Forward):
            forward = getattr(forward, "__wrapped__", None)  # accelerate wraps it for autocast
        if forward is not None:
            return forward.surgery
    return None


def applied(model: nn.Module) -> Surgery:
    """Return the surgery that was applied to this model, or raise ModelError."""
    surgery = surgery_of(model)
    if surgery is None:
        raise ModelError(
            f"nothing was applied to this {type(model).__name__}. Call surgery.apply(model, ...) "
            "first; surgery.available() lists the passes."
        )
    return surgery
