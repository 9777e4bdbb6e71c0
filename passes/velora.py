"""VeLoRA: sub-token projections instead of activations. arXiv 2405.17991 (NeurIPS 2024).

A Linear's input x (rows, in) is cut into G sub-tokens of m = in / G channels, and each is projected
onto one unit vector v (m), the same for all sub-tokens:

    z = x (I_G ⊗ v)    (rows, G)        kept for backward instead of x
    dS = scale g^T z   (out, G)         the gradient of S, with W = W_0 + S (I_G ⊗ v^T)
    dW = dS (I_G ⊗ v^T)                 the paper's gradient, of rank G: `dense=True`

The forward, dx and db are exact. Adam on S keeps G / in of dense Adam's state; the product for the
weight's gradient is m times cheaper. v is the mean sub-token of the first batch, normalised, or
random. Differences from the published codes, all on purpose: docs/passes/velora.md.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch._subclasses import FakeTensor
from torch.fx import GraphModule
from torch.nn import functional

from surgery import noise
from surgery.coordinates import Piece, piece_of, wide
from surgery.errors import CaptureError, SurgeryError, TargetError, listed
from surgery.linears import inputs_of, linears
from surgery.projection import Rewritten, project_linears
from surgery.registry import check_types, demand, register
from surgery.state import Method, Surgery
from surgery.targets import Targets, is_transposed, select


@register("velora")
@dataclass(frozen=True, kw_only=True)
class Velora:
    """Options of VeLoRA.

    groups: sub-tokens of an input (G); padded with zeros where G does not divide its width. init:
    v from the mean of the first batch (padding left out), or "random". period: draw v anew every
    so many optimizer steps. dense: the gradient goes to the weight itself, as in the paper, instead
    of the coordinates. scale: of the gradient; without effect under Adam. always: weights trained
    densely besides. targets: weights of Linears (default: all in the repeated blocks; those with no
    more than `groups` inputs are trained densely). Everything else is frozen.
    """

    groups: int = 64
    init: Literal["mean", "random"] = "mean"
    period: int | None = None
    dense: bool = False
    scale: float = 1.0
    always: str | Sequence[str] = ()
    targets: Targets = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        demand(self.groups >= 1, self, f"groups={self.groups} of an input must be at least 1.")
        steps = f"period={self.period} is a number of optimizer steps, at least 1, or None."
        demand(self.period is None or self.period >= 1, self, steps)
        positive = math.isfinite(self.scale) and self.scale > 0
        demand(positive, self, f"scale={self.scale} of the gradient must be positive.")

    def start(self, model: nn.Module) -> SubTokens:
        """Choose the weights of a model; changes nothing. Raises TargetError."""
        always = select(model, self.always, "always") if self.always else []
        names = [name for name in linears(model, self.targets, "velora") if name not in always]
        small = [name for name in names if inputs_of(model, name) <= self.groups]
        if small and self.targets is not None:
            raise TargetError(
                f"velora: {listed(small)} has {inputs_of(model, small[0])} inputs, no more than "
                f"groups={self.groups}: nothing to compress. Use fewer groups, leave it out of "
                "targets=, or train it densely with always=[...]."
            )
        names = [name for name in names if name not in small]
        if not names:
            raise TargetError(
                f"velora: no trainable Linear with more than groups={self.groups} inputs among the "
                "targets. Use fewer groups, name others with targets=[...], and check that "
                "requires_grad was not switched off before surgery.apply."
            )
        method = SubTokens(options=self, total=sum(p.numel() for p in model.parameters()))
        method.mapped = [self._piece(model, name, method) for name in names]
        dense = [name for name, _ in model.named_parameters() if name in {*always, *small}]
        method.always = [piece_of(name, model.get_parameter(name), None) for name in dense]
        for piece in method.always:
            piece.active = True
        return method

    def _piece(self, model: nn.Module, name: str, method: SubTokens) -> Piece:
        weight = model.get_parameter(name)
        owner = model.get_submodule(name.rpartition(".")[0])
        inputs = inputs_of(model, name)
        width = math.ceil(inputs / self.groups)
        note = SubTokenMap(
            direction=Direction(name=name, width=width, method=method),
            inputs=inputs,
            transposed=is_transposed(owner),
            dense=self.dense,
        )
        if self.dense:
            return Piece(weight=name, index=None, parameter=weight, active=True, note=note)
        out = weight.numel() // inputs
        start = torch.zeros(out, note.groups, dtype=wide(weight), device=weight.device)
        return Piece(
            weight=name,
            index=None,
            parameter=nn.Parameter(start),
            active=True,
            map=note,
            note=note,
        )


@dataclass(eq=False, kw_only=True)
class SubTokens(Method):
    """The run-time state: which weights, since when, and the mask of the batch under way."""

    name: str = "velora"
    options: Velora
    total: int  # parameters of the model
    mapped: list[Piece] = field(default_factory=list)
    always: list[Piece] = field(default_factory=list)
    found: Rewritten = field(default_factory=Rewritten)
    round: int = 0
    steps: int = 0  # optimizer steps made since v was drawn
    mask: Tensor | None = None
    rehearsal: bool = False

    @property
    def pieces(self) -> Sequence[Piece]:
        return [*self.mapped, *self.always]

    def before_forward(self, arguments: Mapping[str, Any], rehearsal: bool) -> None:
        mask = arguments.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.rehearsal = rehearsal

    def rewrite(self, graph: GraphModule, inputs: Sequence[Any]) -> None:
        project_linears(graph, inputs, {piece.weight for piece in self.mapped}, self.found)

    def check_reached(self) -> None:
        missing = [p.weight for p in self.mapped if p.weight not in self.found.names]
        if missing:
            raise CaptureError(
                f"velora: {listed(missing)} is not read by a Linear of its own in the captured "
                "forward, so its input cannot be projected. Leave it out of targets=, or train it "
                "densely with always=[...]."
            )
        if self.found.kept and self.options.targets is not None:
            warnings.warn(
                f"velora saves no activations at {self._kept()}. Its gradient and optimizer state "
                "are small all the same. Add the other readers of the same input to targets=, or "
                "leave it out.",
                stacklevel=2,
            )

    def after_step(self, surgery: Surgery) -> None:
        self.steps += 1
        if self.steps != self.options.period:
            return
        self.round += 1
        self.steps = 0
        for piece in self.mapped:
            piece.note.direction.vector = None
            if piece.map is not None:
                piece.parameter.detach().zero_()
        surgery.forget(self.mapped)

    def lines(self) -> Iterable[tuple[str, str]]:
        rows = [piece.note for piece in self.mapped]
        numel = sum(piece.numel for piece in self.mapped)
        yield "projected", f"{len(rows)} weights, by {numel:,} coordinates"
        if self.options.dense:
            yield "dense", "gradients and optimizer state have the size of the weights"
        padded = [p.weight for p in self.mapped if p.note.inputs % p.note.width]
        if padded:
            yield "padded", f"groups={self.options.groups} does not divide: {listed(padded, 3)}"
        if self.found.kept:
            yield "no activations saved", self._kept()
        if self.options.scale != 1.0:
            yield "scale", f"{self.options.scale}: without effect under Adam, except through eps"
        always = sum(piece.numel for piece in self.always)
        yield "trained densely", f"{always:,} parameters, {always / self.total:.2%}"
        if self.options.period is not None:
            yield "round", f"{self.round}, step {self.steps} of {self.options.period}"

    def _kept(self) -> str:
        by = self.found.kept
        return listed([f"{n} (its input is kept for {op})" for n, op in sorted(by.items())], 3)


@dataclass(eq=False, kw_only=True)
class Direction:
    """v (width), one for all weights that read the same x, named after the first of them."""

    name: str
    width: int
    method: SubTokens
    vector: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """Return v, taken from x (rows, in) or drawn if there is none yet."""
        if self.vector is None:
            if isinstance(x, FakeTensor):
                return x.new_ones(self.width)
            options = self.method.options
            found = self._random() if options.init == "random" else self._mean(x)
            if found is None:  # no rows, or not finite: not to be kept
                return x.new_full((self.width,), self.width**-0.5)
            found = found.to(x.device, wide(x))
            if self.method.rehearsal:
                return found.to(x.dtype)
            self.vector = found
        if self.vector.device != x.device:
            self.vector = self.vector.to(x.device)
        return self.vector.to(x.dtype)

    def _random(self) -> Tensor:
        options = self.method.options
        words = noise.words(self.width, options.seed, "velora", self.name, self.method.round)
        return functional.normalize(torch.special.ndtri((words + 0.5) * 2.0**-32), dim=0)

    def _mean(self, x: Tensor) -> Tensor | None:
        mask = self.method.mask
        if mask is not None and mask.numel() == x.shape[0]:
            x = x[mask.flatten() != 0]
        sums = _cut(x.sum(0, dtype=torch.float64)[None], self.width).sum((0, 1))
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)  # normalised afterwards: the number of rows cancels
        norm = sums.norm()
        if not norm.isfinite() or not x.numel():
            return None
        return sums / norm if norm > 0 else torch.full_like(sums, self.width**-0.5)


@dataclass(eq=False, kw_only=True)
class SubTokenMap:
    """C = I_G ⊗ v beside one weight: a `surgery.projection.Projection`."""

    direction: Direction
    inputs: int
    transposed: bool
    dense: bool

    @property
    def width(self) -> int:
        return self.direction.width

    @property
    def groups(self) -> int:
        return math.ceil(self.inputs / self.width)

    @property
    def scale(self) -> float:
        return self.direction.method.options.scale

    def share(self, other: Any) -> None:
        self.direction = other.direction

    def compress(self, rows: Tensor) -> Tensor:
        v = self.direction.of(rows)
        whole = rows.shape[1] // self.width * self.width
        z = rows[:, :whole].unflatten(1, (-1, self.width)) @ v
        if whole == rows.shape[1]:
            return z
        return torch.cat([z, rows[:, whole:] @ v[: rows.shape[1] - whole, None]], 1)

    def expand(self, rows: Tensor) -> Tensor:
        v = self.direction.vector
        if v is None:
            raise SurgeryError(
                f"velora: v of {self.direction.name} is taken from the next training batch, which "
                "has not been seen yet."
            )
        return (rows[..., None] * v.to(rows)).flatten(1)[:, : self.inputs]


def _cut(x: Tensor, width: int) -> Tensor:
    """Return the sub-tokens (rows, G, width) of x (rows, in), padded with zeros."""
    return functional.pad(x, (0, -x.shape[1] % width)).unflatten(1, (-1, width))
