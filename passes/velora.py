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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from surgery.passkit import (
    Coordinate,
    Projecting,
    Projection,
    Run,
    SurgeryError,
    Targets,
    add_up,
    check_types,
    choose,
    demand,
    densely,
    inputs_of,
    is_transposed,
    listed,
    mapped,
    noise,
    register,
    wide,
)


@register("velora")
@dataclass(frozen=True, kw_only=True)
class Velora:
    """Options of VeLoRA.

    groups: the number of sub-tokens of an input (G); the input is padded with zeros if G does not
    divide its width. init: where v comes from: the mean of the first batch without its padding
    ("mean"), or "random". period: the number of optimizer steps after which v is drawn anew.
    dense: whether the gradient goes to the weight itself, as in the paper, instead of to the
    coordinates. scale: a factor of the gradient; it has no effect under Adam. always: weights that
    are trained densely as well. targets: weights of Linears (default: all in the repeated blocks;
    those with no more than `groups` inputs are trained densely). Everything else is frozen.
    """

    saves = ("gradients", "optimizer", "activations")

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
        steps = f"period={self.period} must be at least 1 step, or None."
        demand(self.period is None or self.period >= 1, self, steps)
        positive = math.isfinite(self.scale) and self.scale > 0
        demand(positive, self, f"scale={self.scale} of the gradient must be positive.")

    def start(self, model: nn.Module) -> SubTokens:
        """Choose the weights of a model; changes nothing. Raises TargetError."""
        names, dense = choose(model, self.targets, self.always, "velora", "groups", self.groups)
        method = SubTokens(
            options=self,
            total=sum(p.numel() for p in model.parameters()),
            named=self.targets is not None,
            period=self.period,
        )
        method.projected = [self._coordinate(model, name, method) for name in names]
        method.always = densely(model, dense)
        return method

    def _coordinate(self, model: nn.Module, name: str, method: SubTokens) -> Coordinate:
        inputs = inputs_of(model, name)
        width = math.ceil(inputs / self.groups)
        projection = SubTokenMap(
            direction=Direction(name=name, width=width, method=method),
            inputs=inputs,
            transposed=is_transposed(model.get_submodule(name.rpartition(".")[0])),
            dense=self.dense,
        )
        if not self.dense:
            return mapped(model, name, projection)
        (whole,) = densely(model, [name])
        whole.beside = projection
        return whole


@dataclass(eq=False, kw_only=True)
class SubTokens(Projecting):
    """The run-time state, and the mask of the batch under way."""

    name: str = "velora"
    options: Velora
    mask: Tensor | None = None
    rehearsal: bool = False

    def before_forward(self, arguments: Mapping[str, Any], run: Run) -> None:
        mask = arguments.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.rehearsal = run.rehearsal

    def redraw(self, run: Run) -> None:
        for each in self.projected:
            map_of(each).direction.vector = None
            if each.mapped:
                each.parameter.detach().zero_()
        run.forget(self.projected)

    def state(self) -> dict[str, Any]:
        own = {m.origin: m.direction.vector for m in map(map_of, self.projected)}
        return super().state() | {"v": {name: v for name, v in own.items() if v is not None}}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        for each in map(map_of, self.projected):
            each.direction.vector = state["v"].get(each.origin)

    def lines(self) -> Iterable[tuple[str, str]]:
        yield from super().lines()
        if self.options.dense:
            yield "dense", "gradients and optimizer state have the size of the weights"
        own = [(each.weight, map_of(each)) for each in self.projected]
        padded = [name for name, m in own if m.inputs % m.sub_token]
        if padded:
            yield "padded", f"groups={self.options.groups} does not divide: {listed(padded, 3)}"
        if self.options.scale != 1.0:
            yield "scale", f"{self.options.scale}: without effect under Adam, except through eps"


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
            options = self.method.options
            found = self._random() if options.init == "random" else self._mean(x)
            if found is None:  # no rows, or not finite: not to be kept
                return x.new_full((self.width,), self.width**-0.5)
            found = found.to(x.device, x.dtype).to(wide(x))  # the same v for z and for the steps
            if self.method.rehearsal:
                return found.to(x.dtype)
            self.vector = found
        if self.vector.device != x.device:
            self.vector = self.vector.to(x.device)
        return self.vector.to(x.dtype)

    def _random(self) -> Tensor:
        options = self.method.options
        labels = ("velora", self.name, self.method.round)
        return functional.normalize(noise.normal((self.width,), options.seed, *labels), dim=0)

    def _mean(self, x: Tensor) -> Tensor | None:
        mask = self.method.mask
        if mask is not None and mask.numel() == x.shape[0]:
            x = x[rearrange(mask, "row token -> (row token)") != 0]
        sums = _cut(x.sum(0, dtype=torch.float64)[None], self.width).sum((0, 1))
        add_up(sums)  # over ranks; normalised afterwards: the number of rows cancels
        norm = sums.norm()
        if not norm.isfinite() or not x.numel():
            return None
        return sums / norm if norm > 0 else torch.full_like(sums, self.width**-0.5)


def map_of(coordinate: Coordinate) -> SubTokenMap:
    assert isinstance(coordinate.beside, SubTokenMap)
    return coordinate.beside


@dataclass(eq=False, kw_only=True)
class SubTokenMap(Projection):
    """C = I_G ⊗ v beside one weight."""

    by: ClassVar[str] = "velora"
    direction: Direction
    inputs: int
    transposed: bool
    dense: bool

    @property
    def sub_token(self) -> int:
        return self.direction.width

    @property
    def width(self) -> int:
        return math.ceil(self.inputs / self.sub_token)

    @property
    def scale(self) -> float:
        return self.direction.method.options.scale

    @property
    def origin(self) -> str:
        return self.direction.name

    @property
    def size(self) -> tuple[int, ...]:
        return (self.sub_token,)

    @property
    def drawn(self) -> Tensor | None:
        return self.direction.vector

    def made_of(self, numbers: Tensor) -> SubTokenMap:
        return replace(self, direction=replace(self.direction, vector=numbers))

    def share(self, other: Any) -> None:
        self.direction = other.direction

    def compress(self, rows: Tensor) -> Tensor:
        v = self.direction.of(rows)
        whole = rows.shape[1] // self.sub_token * self.sub_token
        z = _sub_tokens(rows[:, :whole], self.sub_token) @ v
        if whole == rows.shape[1]:
            return z
        return torch.cat([z, rows[:, whole:] @ v[: rows.shape[1] - whole, None]], 1)

    def expand(self, rows: Tensor) -> Tensor:
        v = self.direction.vector
        if v is None:
            raise SurgeryError(
                f"velora: the vector v of {self.direction.name} is computed from the next training "
                "batch, which has not been seen yet. Run a training forward first."
            )
        return _spread(rows, rows, v, self.inputs)

    def pure(self) -> tuple[Any, ...] | None:
        v = self.direction.vector
        return None if v is None else (_spread, v, self.inputs)

    def add_into(self, matrix: Tensor, rows: Tensor) -> None:
        v = self.direction.vector
        if v is None or self.inputs % self.sub_token:
            matrix += self.expand(rows)
        else:
            matrix.unflatten(1, (-1, self.sub_token)).addcmul_(rows[..., None], v.to(rows))


def _spread(_: Tensor, rows: Tensor, v: Tensor, inputs: int) -> Tensor:
    change = rearrange(rows[..., None] * v.to(rows), "out group channel -> out (group channel)")
    return change[:, :inputs]


def _cut(x: Tensor, width: int) -> Tensor:
    """Return the sub-tokens (rows, G, width) of x (rows, in), padded with zeros."""
    return _sub_tokens(functional.pad(x, (0, -x.shape[1] % width)), width)


def _sub_tokens(x: Tensor, width: int) -> Tensor:
    return rearrange(x, "row (group channel) -> row group channel", channel=width)
