"""A backward under way: what has got a gradient, and what is due once it has ended."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from surgery.compat.autograd import after_backward, backward_now
from surgery.compat.tensors import is_playing
from surgery.engine.decide import Decision
from surgery.engine.fsdp import average_replicated
from surgery.engine.guards import around
from surgery.errors import OptimizerError, SurgeryError
from surgery.weights import shards
from surgery.weights.coordinate import Coordinate
from surgery.weights.gradients import norms
from surgery.weights.indices import block_of
from surgery.weights.sites import Site


@dataclass(eq=False, kw_only=True)
class Backward:
    """The backward of one surgery.

    first: the coordinate that got the first gradient in the backward under way. number: which that
    is. fused: whether the
    optimizer takes gradients away meanwhile. replicated: coordinates that each rank holds whole
    beside weights that FSDP2 has cut. reduced: weights that it has cut, trained by copies: it gives
    them gradients. apart: weights that have got one themselves.
    """

    decision: Decision
    first: Coordinate | None = None
    number: int = -1
    fused: bool = False
    replicated: Sequence[Coordinate] = ()
    reduced: Sequence[Site] = ()
    pending: bool = False  # whether a backward has ended since the last step
    apart: list[Site] = field(default_factory=list)
    handed: list[Site] = field(default_factory=list)  # of these, what a step has not used yet
    watching: bool = True  # whether to look for steps by hand; `last`: what they would change
    last: tuple[weakref.ref[Coordinate], int, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {
            "first": None,
            "replicated": (),
            "reduced": (),
            "apart": [],
            "handed": [],
            "pending": False,
            "last": None,
        }

    def begin(self) -> None:
        """Forget a backward that an error has ended; not one that runs the model again (checkpoint
        around it)."""
        if self.first is None or self.number != backward_now():
            self.first = None
            self.apart.clear()

    def bind(self, *, replicated: Sequence[Coordinate], reduced: Sequence[Site]) -> None:
        """Note what FSDP2 leaves to us of the gradients."""
        self.replicated, self.reduced = replicated, reduced

    def written(self) -> bool:
        """Whether somebody has written what got the first gradient of the last backward, since."""
        last, self.last = self.last, None
        if last is None or not self.pending or (coordinate := last[0]()) is None:
            return False
        own = coordinate.parameter
        return shards.version(own) != last[1] or not torch.equal(_some(own), last[2])

    def used(self) -> None:
        """Note that a step has used the gradients."""
        self.pending = self.watching = False
        self.last = None
        self.handed.clear()

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
        return _when_accumulated(coordinate.read, hook)

    def watch_weight(self, site: Site) -> Any:
        """Hear when a weight that is trained through others gets a gradient itself."""
        hook = partial(_penalised, weakref.ref(site), weakref.ref(self))
        weight = site.weight()
        assert weight is not None
        return _when_accumulated(weight, hook)

    def begun(self, first: Coordinate) -> None:
        """Note the first gradient of a backward, and ask to hear of its end."""
        if self.first is None:
            self.first, self.number = first, backward_now()
            # Twice: behind what DDP and FSDP2 queue, to put averaged gradients in place.
            after_backward(lambda: after_backward(self.end))

    def shares(self, coordinate: Coordinate) -> bool:
        """Whether the parameter of a coordinate also stands for a weight that is being trained."""
        own = coordinate.parameter
        return any(each.active for each in self.decision.coordinates if each.parameter is own)

    def end(self) -> None:
        """Take the norm of every watched gradient: after backward, before anyone clips them."""
        first, self.first, self.pending = self.first, None, True
        if self.watching and first is not None and not is_playing():
            own = first.parameter
            self.last = weakref.ref(first), shards.version(own), _some(own).clone()
        apart = [*self.apart]
        self.apart.clear()
        self.handed += apart
        for site in [*apart, *self.reduced]:
            self._hand_on(site)
        if first in [each for site in apart for each in site.coordinates]:
            first = None
        if first and first.twin is None and first.parameter.grad is None and not self.fused:
            raise OptimizerError(
                f"the gradient of {first.name} was removed before backward had ended, without an "
                "optimizer's step(), so it is not known whether it was used. If this is LOMO: "
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

    def take_by_hand(self) -> None:
        """Hand on gradients that were set on weights by hand, where nothing has set those of the
        coordinates as well; what is not trained now gets none."""
        for site in self.decision.sites:
            weight = site.weight()
            if weight is None or weight.grad is None or site.coordinates[0].frozen:
                continue
            known = [each.parameter.grad is not None for each in site.coordinates if each.active]
            if not known or (any(known) and not site.whole):
                weight.grad = None
            elif not site.whole:
                self._hand_on(site)

    def _hand_on(self, site: Site) -> None:
        """Give the gradient of a weight to what is trained of it."""
        weight = site.weight()
        if weight is None:
            return
        gradient, weight.grad = weight.grad, None
        if gradient is None:
            return
        for each in site.coordinates:
            if not each.active:
                continue
            if each.mapped:
                matrix = gradient.t() if each.mapped.map.transposed else gradient
                own = each.mapped.map.adjoint(matrix.reshape(-1, matrix.shape[-1]))
                if own is None:
                    raise SurgeryError(
                        f"{site.name} has received a gradient of its own, but the pass trains it "
                        "along directions only, by the slope of what the model returns. Leave the "
                        "penalty on the weight out of the loss. To pull weights towards zero, use "
                        "weight_decay= of the pass."
                    )
            else:
                own = block_of(gradient, each.index)
            into, own = each.parameter, own.to(each.parameter.dtype, copy=True)
            into.grad = own if into.grad is None else into.grad + own


def _some(t: Tensor) -> Tensor:
    return shards.local(t.detach()).flatten()[:64]


def _when_accumulated(tensor: Any, hook: Any) -> Any:
    required = tensor.requires_grad
    tensor.requires_grad_(True)  # torch refuses a frozen one, which may be switched on later
    try:
        return tensor.register_post_accumulate_grad_hook(hook)
    finally:
        tensor.requires_grad_(required)


def _penalised(
    site_ref: weakref.ref[Site], backward_ref: weakref.ref[Backward], weight: Tensor
) -> None:
    site, backward = site_ref(), backward_ref()
    if site is None or backward is None or weight.grad is None:
        return
    if not all(each.active for each in site.coordinates):
        weight.grad = None
        raise around(f"a gradient reached {site.name}, which is not being trained now")
    backward.apart.append(site)
    backward.begun(site.coordinates[0])


def _arrived(
    coordinate_ref: weakref.ref[Coordinate], backward_ref: weakref.ref[Backward], grown: Tensor
) -> None:
    coordinate, backward = coordinate_ref(), backward_ref()
    if coordinate is None or backward is None or grown.grad is None:
        return
    # Several weights may share one, of which some are frozen.
    if not coordinate.active and not backward.shares(coordinate):
        raise around(f"a gradient reached {coordinate.name}, which is not being trained now")
    if backward.fused and coordinate.watched and grown.grad is not None:
        (coordinate.norm,) = norms([grown.grad])
    backward.begun(coordinate)
