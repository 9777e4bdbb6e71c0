"""Which weights the forwards have read so far: reached by the rewrite, unused, or lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from surgery.compat.tensors import leaves
from surgery.engine.decide import Decision
from surgery.engine.guards import uncaptured
from surgery.weights.sites import Site


@dataclass(eq=False, kw_only=True)
class Coverage:
    """What is known of the weights of one surgery.

    complete: some training forward has been judged. captures: graphs captured when it was.
    """

    decision: Decision
    complete: bool = False
    captures: int = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"complete": False, "captures": 0}

    @property
    def missing(self) -> list[Site]:
        return [site for site in self.decision.sites if not site.reached]

    @property
    def unused(self) -> list[str]:
        """Names of weights that the output of no forward has depended on."""
        return [site.name for site in self.decision.sites if site.unused]

    def begin(self) -> None:
        """Judge the next training forward anew: another capture makes it."""
        for site in self.decision.sites:
            site.reached = False
        self.captures = -1

    def before(self) -> Any:
        """Return what `after` needs of the state before a forward."""
        if self.complete and not self.missing:
            return None
        return torch.get_rng_state(), get_device_states(*self.decision.model.parameters())

    def after(self, before: Any, plain: Callable[[], Any], captures: int) -> Sequence[Site]:
        """Judge what a training forward has reached; `plain` runs the same one without surgery.

        Returns the weights that its output depends on and that the rewrite has not read: the
        forward was in vain. What it does not depend on is unused, and left alone until some forward
        uses it.
        """
        if self.complete and self.captures == captures:
            return ()
        missing = self.missing
        if missing:
            unused = _unused(missing, self.decision.model, plain, before)
            lost = [site for site in missing if site not in unused]
            if lost:
                return lost
            for site in unused:
                site.note(reached=False)
        if not self.complete:
            if self.decision.rewriting and not captures:
                raise uncaptured(self.decision.model, self.decision.rewriting)
            for method in self.decision.methods:
                method.check_reached()
        self.complete, self.captures = True, captures
        return ()


def _unused(
    sites: Sequence[Site], model: nn.Module, plain: Callable[[], Any], before: Any
) -> list[Site]:
    """Return those of the weights that the output of a forward does not depend on."""
    weights = [site.shown() for site in sites]
    flags = [weight.requires_grad for weight in weights]
    with torch.random.fork_rng(before[1][0]), torch.enable_grad(), again(model, before):
        try:
            for weight in weights:
                weight.requires_grad_(True)
            given = [t for t in leaves(plain()) if isinstance(t, Tensor) and t.requires_grad]
            found: Sequence[Tensor | None] = [None] * len(weights)
            if given:
                total = torch.stack([t.sum().double() for t in given]).sum()
                found = torch.autograd.grad(total, weights, allow_unused=True)
        finally:
            for weight, flag in zip(weights, flags, strict=True):
                weight.requires_grad_(flag)
    return [site for site, grad in zip(sites, found, strict=True) if grad is None]


@contextmanager
def again(model: nn.Module, before: Any) -> Iterator[None]:
    """Let a forward inside find the generators as `Coverage.before` did, and write no buffer."""
    torch.set_rng_state(before[0])
    set_device_states(*before[1])
    buffers = _spare_buffers(model)
    try:
        yield
    finally:
        for module, name, buffer in buffers:
            setattr(module, name, buffer)


def _spare_buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Put copies in the place of buffers, for a forward to write into; return what was there.

    Copied back, they would count as changed for the backward of the forward that came before.
    """
    held = [(m, n, b) for m in model.modules() for n, b in m.named_buffers(recurse=False)]
    for module, name, buffer in held:
        setattr(module, name, buffer.clone())
    return held
