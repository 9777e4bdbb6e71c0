"""Rounds: every `period` optimizer steps, another set of units is trained. MISA, LISA, BAdam."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from surgery.coordinates import Piece, piece_of
from surgery.errors import ConflictError, OptimizerError, TargetError
from surgery.state import Method, Surgery
from surgery.targets import Targets, blocks, select


class Scores(Protocol):
    """What a method learns from the gradients of the active units."""

    def observe(self, squared: dict[str, float]) -> None:
        """Take the mean squared gradient entry of each active unit, one optimizer step."""

    def close(self) -> None:
        """Fold what was observed in the round that ends now."""


class Stateful(Protocol):
    """What a method has learned or drawn so far, and cannot draw again."""

    def state(self) -> dict[str, Any]:
        """Return it: numbers and strings, nested by name."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""


@dataclass(eq=False, kw_only=True)
class Rounds(Method):
    """The state of a sampling pass: which units are trained, and when that changes.

    units: what is drawn, by name, each a set of coordinates. draw: round -> names of the units to
    train in it. always: coordinates trained in every round. learned: what a resumed run needs.
    """

    name: str
    units: dict[str, tuple[Piece, ...]]
    period: int
    draw: Callable[[int], Sequence[str]]
    always: tuple[Piece, ...] = ()
    scores: Scores | None = None
    learned: Mapping[str, Stateful] = field(default_factory=dict)
    flush: bool = False
    total: int  # parameters of the model
    round: int = 0
    steps: int = 0  # optimizer steps made in this round
    active: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        for piece in self.always:
            piece.active = True
        self._activate(self.draw(0))
        # If everything fits into one round, there is nothing to choose and no score to measure.
        watched = self.scores is not None and len(self.active) < len(self.units)
        for unit in self.units.values():
            for piece in unit:
                piece.watched = watched

    @property
    def pieces(self) -> Sequence[Piece]:
        return [*(piece for unit in self.units.values() for piece in unit), *self.always]

    def adopt(self, piece: Piece) -> bool:
        for name, unit in self.units.items():
            own = [p for p in unit if p.weight == piece.weight]
            if own and self.flush:
                raise ConflictError(
                    f"{self.name}: flush=True writes into weights past the coordinates that train "
                    f"{piece.weight}. Use flush=False, or leave it out of the targets of one pass."
                )
            if own and own[0].index is None:
                piece.active, piece.watched = name in self.active, own[0].watched
                self.units[name] = tuple(piece if p is own[0] else p for p in unit)
                return True
        return False

    def check(self, optimizer: Optimizer) -> None:
        if self.flush and not all("betas" in group for group in optimizer.param_groups):
            raise OptimizerError(
                f"{self.name}: flush=True adds Adam's momentum tail at the end of a round, and "
                f"{type(optimizer).__name__} has no betas. Use torch.optim.Adam or AdamW, or "
                "flush=False."
            )

    def after_step(self, surgery: Surgery) -> None:
        self.steps += 1
        scores = self.scores if len(self.active) < len(self.units) else None
        if scores is not None:
            scores.observe(self._squared(surgery.loss_scale))
        if self.steps < self.period:
            return
        if scores is not None:
            scores.close()
        before = self.active
        leaving = self._of(before)
        if self.flush:
            # Not all that ever stepped: one that was replaced may still be alive, with its state.
            for optimizer in surgery.driving:
                momentum_flush(optimizer, leaving)
        self.round += 1
        self.steps = 0
        self._activate(self.draw(self.round))
        kept = frozenset() if self.flush else before & self.active
        surgery.forget(self._of((before | self.active) - kept))

    def state(self) -> dict[str, Any]:
        counters = {"round": self.round, "steps": self.steps, "active": sorted(self.active)}
        return counters | {name: each.state() for name, each in self.learned.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.round, self.steps = state["round"], state["steps"]
        self._activate(state["active"])
        for name, each in self.learned.items():
            each.restore(state[name])

    def lines(self) -> Iterable[tuple[str, str]]:
        share = sum(p.size for p in self._of(self.active)) / self.total
        yield "units", f"{len(self.units)}, of which {len(self.active)} are trained in this round"
        yield "trained now", f"{share:.2%} of {self.total:,} parameters"
        always = sum(piece.numel for piece in self.always)
        yield "trained always", f"{always:,} parameters, {always / self.total:.2%}"
        candidates = sum(piece.size for unit in self.units.values() for piece in unit)
        frozen = self.total - candidates - always
        yield "frozen for good", f"{frozen:,} parameters, {frozen / self.total:.2%}"
        yield "round", f"{self.round}, step {self.steps} of {self.period}"

    def _of(self, names: Iterable[str]) -> list[Piece]:
        return [piece for name in sorted(names) for piece in self.units[name]]

    def _activate(self, names: Sequence[str]) -> None:
        self.active = frozenset(names)
        for name, unit in self.units.items():
            for piece in unit:
                piece.active = name in self.active

    def _squared(self, scale: float) -> dict[str, float]:
        """Return the mean squared gradient entry of each active unit, free of the loss scale."""
        seen = [(name, p) for name in sorted(self.active) for p in self.units[name]]
        norms = [p.norm if p.norm is not None else torch.zeros(()) for _, p in seen]
        devices = {norm.device for norm in norms}
        stacked = torch.stack([norm.to("cpu") for norm in norms] if len(devices) > 1 else norms)
        squared = (stacked.double() / scale).square().tolist()  # one synchronisation a step
        sums = dict.fromkeys(self.active, 0.0)
        sizes = dict.fromkeys(self.active, 0)
        for (name, piece), value in zip(seen, squared, strict=True):
            sums[name] += value
            sizes[name] += piece.size  # E ||dB||^2 = ||dW||^2 for a mapped coordinate B
            piece.norm = None
        return {name: sums[name] / sizes[name] for name in self.active}


@torch.no_grad()
def momentum_flush(optimizer: Optimizer, pieces: Iterable[Piece]) -> None:
    """Apply MISA's extra momentum step (arXiv 2511.00056, Algorithm 1, line 16), in place.

    W <- W - lr * beta1 / (1 - beta1) * m / (sqrt(v) + eps), with bias-corrected m and v: all that
    the momentum would still have added if every later gradient were zero. No decay.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for piece in pieces:
        state = optimizer.state.get(piece.parameter)
        if not state:
            continue
        group = groups[id(piece.parameter)]
        beta1, beta2 = group["betas"]
        step = float(state["step"])
        mean = state["exp_avg"] / (1 - beta1**step)
        root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        sign = 1.0 if group.get("maximize") else -1.0
        tail = sign * float(group["lr"]) * beta1 / (1 - beta1)
        piece.parameter.addcdiv_(mean, root, value=tail)


def whole_blocks(
    model: nn.Module, targets: Targets, name: str
) -> tuple[dict[str, tuple[Piece, ...]], list[str]]:
    """Return the model's blocks as units of all their trainable parameters, and what lies outside.

    Raises TargetError if nothing is left inside the blocks.
    """
    allowed = {n for n, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    if targets is not None:
        allowed &= set(select(model, targets, "targets"))
    units: dict[str, tuple[Piece, ...]] = {}
    for block, names in blocks(model).items():
        own = [piece_of(n, model.get_parameter(n), None) for n in names if n in allowed]
        if own:
            units[block] = tuple(own)
    if not units:
        raise TargetError(
            f"{name}: no trainable parameter in the repeated blocks of this model. Check targets=, "
            "and that requires_grad was not switched off before surgery.apply."
        )
    inside = {piece.weight for unit in units.values() for piece in unit}
    return units, [n for n, _ in model.named_parameters() if n in allowed - inside]
