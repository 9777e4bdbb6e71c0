"""A backward under way: what has got a gradient, and what is due once it has ended."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from surgery.compat.autograd import after_backward
from surgery.engine.decide import Decision
from surgery.engine.fsdp import average_replicated
from surgery.engine.guards import around
from surgery.errors import OptimizerError
from surgery.weights import shards
from surgery.weights.coordinate import Coordinate
from surgery.weights.gradients import norms


@dataclass(eq=False, kw_only=True)
class Backward:
    """The backward of one surgery.

    first: the coordinate that got the first gradient in the backward under way. fused: whether the
    optimizer takes gradients away meanwhile. replicated: coordinates that each rank holds whole
    beside weights that FSDP2 has cut.
    """

    decision: Decision
    first: Coordinate | None = None
    fused: bool = False
    replicated: Sequence[Coordinate] = ()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"first": None, "replicated": ()}

    def begin(self, replicated: Sequence[Coordinate] | None = None) -> None:
        """Forget a backward that an error has ended. replicated: as above, if that has changed."""
        self.first = None
        if replicated is not None:
            self.replicated = replicated

    @contextmanager
    def taken_meanwhile(self) -> Iterator[None]:
        """Let an optimizer take gradients away while the backwards inside are under way."""
        self.fused = True
        try:
            yield
        finally:
            self.fused = False

    def watch(self, coordinate: Coordinate) -> Any:
        """Hear when a coordinate gets its gradient; return the handle of the hook."""
        hook = partial(_arrived, weakref.ref(coordinate), weakref.ref(self))
        return coordinate.read.register_post_accumulate_grad_hook(hook)

    def end(self) -> None:
        """Take the norm of every watched gradient: after backward, before anyone clips them."""
        first, self.first = self.first, None
        if first and first.twin is None and first.parameter.grad is None and not self.fused:
            raise OptimizerError(
                f"the gradient of {first.name} was taken away before backward had ended, without "
                "an optimizer's step(), so nobody knows what became of it. If this is LOMO: "
                "surgery.step(model, optimizer, lambda: optimizer.fused_backward(loss, lr))"
            )
        if self.replicated:
            average_replicated(self.replicated, self.decision.sites)
        seen = [
            (each, grad)
            for each in self.decision.coordinates
            if each.watched and each.active and (grad := each.parameter.grad) is not None
        ]
        found = norms([grad for _, grad in seen])
        for (each, grad), norm in zip(seen, found, strict=True):
            each.norm, each.version = norm, shards.version(grad)


def _arrived(
    coordinate_ref: weakref.ref[Coordinate], backward_ref: weakref.ref[Backward], grown: Tensor
) -> None:
    coordinate, backward = coordinate_ref(), backward_ref()
    if coordinate is None or backward is None or grown.grad is None:
        return
    if not coordinate.active:
        raise around(f"a gradient reached {coordinate.name}, which is not being trained now")
    if backward.fused and coordinate.watched and grown.grad is not None:
        (coordinate.norm,) = norms([grown.grad])
    if backward.first is None:
        backward.first = coordinate
        # Twice: behind what DDP and FSDP2 queue, to put averaged gradients in place.
        after_backward(lambda: after_backward(backward.end))
