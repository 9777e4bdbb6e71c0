"""The optimizer of a step that is played, made of parameters without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn
from torch.optim import Optimizer

from surgery.errors import OptimizerError, OptionError, in_a_line
from surgery.prediction.devices import Device

Making = Callable[[Iterable[nn.Parameter]], Optimizer]


def check_making(make: object) -> None:
    """Raise OptionError for what makes no optimizer."""
    if isinstance(make, Optimizer) or not callable(make):
        given = type(make).__name__
        raise OptionError(
            f"optimizer= is a {given}, but must be a callable that makes one of parameters: "
            "optimizer=torch.optim.AdamW, or functools.partial(torch.optim.SGD, momentum=0.9)."
        )


def made_for(device: Device | None, make: Making, trained: Sequence[nn.Parameter]) -> Optimizer:
    """Return an optimizer as it is on a device. Raises OptimizerError if it does not take what is
    trained."""
    try:
        optimizer = make(trained)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptimizerError(
            f"the optimizer does not take the {len(trained)} parameters that this model trains: "
            f"{in_a_line(error, 200)}"
        ) from error
    if device is not None and device.accelerator:
        for group in optimizer.param_groups:
            if "foreach" in group and group["foreach"] is None and not group.get("fused"):
                group["foreach"] = True  # what torch takes there by itself
    return optimizer
