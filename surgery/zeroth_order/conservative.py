"""Conservative steps: of W, W + a z and W - a z, where a is the step of the scalar, the best.

The step is known once the optimizer has made it, so the forwards whose losses had a backward since
the last step are run again there, from the same state, at each of the three. Each loss counts by
the gradient that reached it: the number of micro-batches and the scale of a loss are in that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, get_rng_state, set_rng_state
from torch.utils.checkpoint import get_device_states, set_device_states

from surgery.errors import ModelError, OptimizerError
from surgery.kernels.autocast import Cast, cast_now
from surgery.ranks import add_up
from surgery.weights import shards
from surgery.zeroth_order.direction import perturbation_of
from surgery.zeroth_order.evaluation import Output, Same

if TYPE_CHECKING:
    from surgery.zeroth_order.method import TwoPoint


@dataclass(eq=False, kw_only=True)
class Again:
    """A forward of the step under way, whose loss can be asked for once more, at other weights.

    cast: the autocast that it ran under. counts: whether it is of the run (not of a report).
    """

    same: Same
    cast: Cast
    counts: bool

    def __call__(self) -> Tensor:
        """Return the loss, float64 (); the generators stay where they are."""
        held = get_rng_state(), get_device_states(*self.same.model.parameters())
        try:
            with self.cast.again():
                (loss,) = Output(self.same()).values
        finally:
            set_rng_state(held[0])
            set_device_states(*held[1])
        return loss.double()


@dataclass(eq=False, kw_only=True)
class Conservative:
    """The losses that the next step is judged by, with the weight of each in their sum."""

    method: TwoPoint
    kept: list[tuple[Again, Tensor]] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"kept": []}

    def again(self, same: Same, output: Output, counts: bool) -> Again:
        """Return a forward that has been evaluated, to be kept once its backward begins."""
        if not output.is_loss:
            raise ModelError(
                f'{self.method.name}: update="conservative" computes the loss again at other '
                "weights, but the model has not returned a loss, and one from the loop cannot be "
                "computed again. Give the model labels, so that it returns output.loss, or apply "
                "surgery to a module around it whose forward returns the loss."
            )
        if self.method.mixed:
            raise ModelError(
                f'{self.method.name}: update="conservative" cannot be used beside weights that are '
                "trained by backward: they have made their step before that of the others is "
                "judged. Use another update=."
            )
        device = self.method.weights[0].parameter.device.type
        return Again(same=same, cast=cast_now(device), counts=counts)

    def keep(self, again: Again, weight: Tensor) -> None:
        """Keep a forward whose backward has begun, and the gradient that its loss has got."""
        held = self.method.weights[0].parameter.grad
        if held is None or not bool(held.any()):  # the first since gradients were dropped
            self.kept.clear()
        self.kept.append((again, weight.double()))

    def check_weights(self) -> None:
        """Raise OptimizerError if the model cannot be run inside of a step."""
        weights = [perturbation_of(each).current() for each in self.method.weights]
        if any(shards.is_cut(weight) for weight in weights):
            raise OptimizerError(
                f'{self.method.name}: update="conservative" runs the model again inside of the '
                "step, where FSDP2 keeps its weights sharded. Use DistributedDataParallel, or "
                "another update=."
            )

    def check_kept(self) -> None:
        """Raise OptimizerError if there is nothing to judge a step by."""
        if not self.kept and self.method.weights[0].parameter.grad is not None:
            raise OptimizerError(
                f'{self.method.name}: update="conservative" compares the losses that have had a '
                "backward since the last step, but there is none: the gradient was set by hand. "
                "Call loss.backward() on what model(...) returns."
            )

    @torch.no_grad()
    def share(self, step: float) -> float:
        """Return what is to be taken of a step, 0, 1 or -1: what ends at the smallest loss."""
        if not step:
            return 0.0
        losses = torch.stack([self._loss_at(shift) for shift in (None, step, -step)])
        add_up(losses)
        found = dict(zip((0.0, 1.0, -1.0), losses.tolist(), strict=True))
        finite = [share for share, loss in found.items() if math.isfinite(loss)]
        return min(finite, key=found.__getitem__, default=0.0)  # of equal ones W, the first

    def _loss_at(self, shift: float | None) -> Tensor:
        with self.method.at(shift):
            return torch.stack([again() * weight for again, weight in self.kept]).sum()
