"""Everything that one `surgery.apply` keeps: plain Python state beside the model, none inside it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from surgery.capture import Dispatch, unreached
from surgery.coordinates import SITES, Piece, Site
from surgery.errors import OptimizerError, SurgeryError, listed

LIVE: weakref.WeakSet[Surgery] = weakref.WeakSet()  # what the clock's global hooks serve


class Method(Protocol):
    """The run-time state of one pass on one model, made by the pass's `start(model)`."""

    name: str
    pieces: Sequence[Piece]  # every coordinate that may ever be trained; empty for exact rewrites

    def check(self, optimizer: Optimizer) -> None:
        """Raise OptimizerError if this optimizer cannot serve the pass. Called before its first step."""

    def after_step(self, surgery: Surgery) -> None:
        """Do what is due after an optimizer step; `surgery.step` steps have been made."""

    def lines(self) -> Iterable[tuple[str, str]]:
        """Return what `report` says of the pass, as (label, value)."""
        ...


@dataclass(eq=False, kw_only=True)
class Surgery:
    """One applied surgery: its passes, their coordinates, and the count of optimizer steps."""

    model: nn.Module
    passes: tuple[Any, ...]
    methods: tuple[Method, ...]
    sites: tuple[Site, ...]
    required_grad: dict[str, bool]  # every parameter's flag before apply, for remove
    inputs_frozen: bool  # no embedding is trained: backward may end above it
    step: int = 0
    skipped: int = 0  # steps whose gradients were NaN or infinite
    captures: int = 0
    loss_scale: float = 1.0  # of the torch GradScaler that drives the step under way
    reached: bool = False
    optimizers: weakref.WeakSet[Optimizer] = field(default_factory=weakref.WeakSet)
    stepped: set[int] = field(default_factory=set)
    refused: bool = False  # the step under way was skipped
    handles: list[Any] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        fresh = {"optimizers": weakref.WeakSet(), "stepped": set(), "handles": []}
        return self.__dict__ | fresh | {"reached": False, "captures": 0}

    @property
    def pieces(self) -> list[Piece]:
        return [piece for site in self.sites for piece in site.pieces]

    # -- binding to the tensors of the model ---------------------------------------------------

    def bind(self) -> None:
        """Make sites and hooks point at the model's present parameters; cheap when they do."""
        if self.handles and all(site.in_place() for site in self.sites):
            return
        self.release()
        for site in self.sites:
            site.bind()
        for piece in self.pieces:
            hook = partial(_after_accumulate, weakref.ref(piece))
            self.handles.append(piece.parameter.register_post_accumulate_grad_hook(hook))
        LIVE.add(self)

    def release(self) -> None:
        """Take the hooks off and forget the sites."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for site in self.sites:
            weight = site.weight()
            if weight is not None:
                SITES.pop(weight, None)
        LIVE.discard(self)

    def check_reached(self) -> None:
        """After the first training forward: raise if some weight was not read through a gate."""
        if self.reached:
            return
        missing = [site.name for site in self.sites if not site.reached]
        if missing:
            raise unreached(missing)
        self.reached = True

    # -- the clock -------------------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer, loss_scale: float) -> None:
        """Check an optimizer at its first step; drop the gradients of a step that is not finite."""
        held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        if optimizer not in self.optimizers:
            if not any(id(p) in held for p in self.model.parameters()):
                return
            self._check_membership(optimizer, held)
            for method in self.methods:
                method.check(optimizer)
            self.optimizers.add(optimizer)
        grads = [
            grad
            for piece in self.pieces
            if piece.active and id(piece.parameter) in held
            if (grad := piece.parameter.grad) is not None
        ]
        self.loss_scale = loss_scale
        self.refused = not _finite(grads)
        if self.refused:
            self.skipped += 1
            for parameter in held.values():
                parameter.grad = None

    def after_step(self, optimizer: Optimizer) -> None:
        """Count the step once every coordinate has been stepped by the optimizer that holds it."""
        if optimizer not in self.optimizers or self.refused:
            return
        wanted = {id(piece.parameter) for piece in self.pieces}
        self.stepped |= {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not wanted <= self.stepped:
            return
        self.stepped.clear()
        self.step += 1
        for method in self.methods:
            method.after_step(self)

    def _check_membership(self, optimizer: Optimizer, held: dict[int, Tensor]) -> None:
        missing = {id(p.parameter): p.name for p in self.pieces if id(p.parameter) not in held}
        if not missing:
            return
        # Only here, once, on the way to an error: another optimizer may hold the rest.
        others = [o for o in gc.get_objects() if issubclass(type(o), Optimizer)]
        for other in others:
            for group in other.param_groups:
                for parameter in group["params"]:
                    missing.pop(id(parameter), None)
        if missing:
            raise OptimizerError(
                f"{type(optimizer).__name__} steps this model but holds none of "
                f"{len(missing)} coordinates, which no other optimizer holds either: "
                f"{listed(missing.values())}. It was probably built before surgery.apply, or from "
                "a part of the parameters. Build it afterwards: "
                "optimizer = torch.optim.AdamW(model.parameters(), lr=...)"
            )

    def forget(self, pieces: Iterable[Piece]) -> None:
        """Free the optimizer state and the gradients of coordinates that leave or enter."""
        for piece in pieces:
            piece.parameter.grad = None
            piece.norm = None
            for optimizer in self.optimizers:
                optimizer.state.pop(piece.parameter, None)


def _after_accumulate(piece_ref: weakref.ref[Piece], parameter: Tensor) -> None:
    piece = piece_ref()
    if piece is None:
        return
    if not piece.active:
        raise SurgeryError(
            f"a gradient reached {piece.name}, which is not being trained now: the forward went "
            "around surgery. Call the model itself, model(...), and not one of its parts."
        )
    if piece.watched and parameter.grad is not None:
        piece.norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)


def _finite(grads: Sequence[Tensor]) -> bool:
    # The largest magnitude cannot overflow, as a sum of squares in float16 would.
    if not grads:
        return True
    return bool(torch.nn.utils.get_total_norm(grads, norm_type=float("inf")).isfinite())


def surgery_of(model: nn.Module) -> Surgery | None:
    """Return the surgery that was applied to this model, or to a model inside of it."""
    for module in model.modules():
        dispatch = module.__dict__.get("forward")
        if isinstance(dispatch, Dispatch):
            return dispatch.surgery
    return None
