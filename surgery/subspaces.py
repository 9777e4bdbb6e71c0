"""What passes share whose optimizer sees a projection of each weight: VeLoRA, RSO."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from surgery.coordinates import Piece, piece_of, wide
from surgery.errors import CaptureError, TargetError, listed
from surgery.ledger import Ledger
from surgery.linears import inputs_of, linears
from surgery.projection import Rewritten, project_linears
from surgery.state import Method, Surgery
from surgery.targets import Targets, select


def choose(
    model: nn.Module,
    targets: Targets,
    always: str | Sequence[str],
    what: str,
    option: str,
    size: int,
    stacked: bool = False,
) -> tuple[list[str], list[str]]:
    """Return the weights to project, and those to train densely, in the model's order.

    Linears among the default targets with no more than `size` inputs are trained densely. Raises
    TargetError, naming the pass `what` and its `option` of that size. stacked: also of experts.
    """
    dense = set(select(model, always, "always")) if always else set()
    names = [name for name in linears(model, targets, what, stacked) if name not in dense]
    small = [name for name in names if inputs_of(model, name) <= size]
    if small and targets is not None:
        raise TargetError(
            f"{what}: {listed(small)} has {inputs_of(model, small[0])} inputs, no more than "
            f"{option}={size}: there is nothing to project. Train it densely with always=[...], or "
            f"use a smaller {option}."
        )
    names = [name for name in names if name not in small]
    if not names:
        raise TargetError(
            f"{what}: no trainable Linear with more than {option}={size} inputs among the targets. "
            f"Use a smaller {option}, name others with targets=[...], and check that requires_grad "
            "was not switched off before surgery.apply."
        )
    return names, [name for name, _ in model.named_parameters() if name in dense | set(small)]


def densely(model: nn.Module, names: Iterable[str]) -> list[Piece]:
    """Return coordinates for weights that are trained whole, all the time."""
    pieces = [piece_of(name, model.get_parameter(name), None) for name in names]
    for piece in pieces:
        piece.active = True
    return pieces


def mapped(model: nn.Module, name: str, size: int, note: Any) -> Piece:
    """Return a coordinate (out, size) of a weight, zero, with the map and projection `note`."""
    weight = model.get_parameter(name)
    out = weight.numel() // inputs_of(model, name)
    start = torch.zeros(out, size, dtype=wide(weight), device=weight.device)
    parameter = nn.Parameter(start)
    return Piece(
        weight=name,
        index=None,
        parameter=parameter,
        active=True,
        map=note,
        covers=weight.numel(),
        note=note,
    )


@dataclass(eq=False, kw_only=True)
class Projecting(Method, ABC):
    """The run-time state: which weights are projected, and since when.

    total: parameters of the model. named: whether the user named the targets. period: optimizer
    steps after which `redraw` is called. shared: one projection for all readers of an input.
    """

    name: str
    total: int
    named: bool
    period: int | None
    fixed: bool = True
    shared: bool = True
    projected: list[Piece] = field(default_factory=list)
    always: list[Piece] = field(default_factory=list)
    found: Rewritten = field(default_factory=Rewritten)
    round: int = 0
    steps: int = 0  # optimizer steps made in this round

    @property
    def pieces(self) -> Sequence[Piece]:
        return [*self.projected, *self.always]

    def rewrite(self, graph: GraphModule, inputs: Sequence[Any], ledger: Ledger) -> None:
        wanted = {piece.weight for piece in self.projected}
        project_linears(graph, inputs, wanted, self.found, self.shared)

    def check_reached(self) -> None:
        missing = [piece.weight for piece in self.projected if not piece.reached]
        if missing:
            raise CaptureError(
                f"{self.name}: {listed(missing)} is not read by a Linear of its own in the "
                "captured forward, so its input cannot be projected. Leave it out of targets=, or "
                "train it densely with always=[...]."
            )
        if self.found.kept and self.named:
            warnings.warn(
                f"{self.name} saves no activations at {self._kept()}. Its gradient and optimizer "
                "state are small all the same. Add the other readers of the same input to "
                "targets=, or leave it out.",
                stacklevel=2,
            )

    def after_step(self, surgery: Surgery) -> None:
        self.steps += 1
        if self.steps == self.period:
            self.round += 1
            self.steps = 0
            self.redraw(surgery)
            for piece in self.projected:
                piece.since = surgery.step

    @abstractmethod
    def redraw(self, surgery: Surgery) -> None:
        """Begin a round: another projection, coordinates from zero."""

    def state(self) -> dict[str, Any]:
        origins = {piece.weight: piece.note.origin for piece in self.projected}
        return {"round": self.round, "steps": self.steps, "origins": origins}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.round, self.steps = state["round"], state["steps"]
        notes = {piece.weight: piece.note for piece in self.projected}
        for name, origin in state["origins"].items():
            if name != origin:
                notes[name].share(notes[origin])

    def lines(self) -> Iterable[tuple[str, str]]:
        numel = sum(piece.numel for piece in self.projected)
        yield "projected", f"{len(self.projected)} weights, by {numel:,} coordinates"
        if self.found.kept:
            yield "no activations saved", self._kept()
        always = sum(piece.numel for piece in self.always)
        yield "trained densely", f"{always:,} parameters, {always / self.total:.2%}"
        if self.period is not None:
            yield "round", f"{self.round}, step {self.steps} of {self.period}"

    def _kept(self) -> str:
        by = self.found.kept
        return listed([f"{n} (its input is kept for {op})" for n, op in sorted(by.items())], 3)
