"""What a weight is moved by in a two-point evaluation: z, drawn again wherever it is needed.

Nothing of a weight's size is kept: forward reads W + s z from a tensor that lives for one
operation (or takes s x z^T from thin factors), and the optimizer's step adds a z in one sweep.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from surgery import noise
from surgery.compat.modules import held
from surgery.graph.linear import rows_of
from surgery.kernels import directions
from surgery.weights.coordinate import Beside, Coordinate
from surgery.weights.matrices import matrix_of, matrix_shape, wide

BAND = 1 << 19  # entries that z is drawn for at a time: 2 MB, the size of a cache


class Probe(Protocol):
    """What is being evaluated now, of all weights. step: optimizer steps made. slot: number of the
    direction. shift: the factor s of z; a tensor with a tangent in forward mode; None for W."""

    seed: int
    kind: directions.Kind
    step: int
    slot: int
    shift: float | Tensor | None

    @property
    def scale(self) -> float:
        """1 / sqrt(number of directions): coordinates a stand for the change scale * sum a z."""
        ...


@dataclass(eq=False, kw_only=True)
class Perturbation(Beside):
    """z beside one weight, entries of variance 1: the map of the (K,) scalars."""

    name: str
    owner: nn.Module
    probe: Probe
    transposed: bool = False  # z has the layout of the weight

    def current(self) -> Tensor:
        """Return the weight, which no evaluation writes."""
        weight = held(self.owner, self.name.rpartition(".")[2])
        assert weight is not None
        return weight.detach()

    def key(self, slot: int, *labels: str | int) -> int:
        """Return what z depends on, besides the place of an entry."""
        return noise.bits(self.probe.seed, "z", self.name, self.probe.step, slot, *labels)

    def rows(self, slot: int, part: slice) -> Tensor:
        """Return rows of z as a matrix (n, width), at least float32."""
        weight = self.current()
        height, width = matrix_shape(weight)
        start, stop, _ = part.indices(height)
        count = (stop - start) * width
        key, device = self.key(slot), weight.device
        z = directions.direction(self.probe.kind, start * width, count, key, device)
        return rearrange(z, "(row column) -> row column", column=width)

    def gather(self, slot: int, ids: Tensor) -> Tensor:
        """Return the rows of z with these numbers (n,)."""
        width = self.current().shape[-1]
        places = ids[:, None] * width + torch.arange(width, device=ids.device)
        return directions.direction_at(self.probe.kind, places, self.key(slot))

    def perturbed(self, dtype: torch.dtype) -> Tensor:
        """Return W + s z, added in float32 (float64) and rounded once to the dtype."""
        weight, shift = self.current(), self.probe.shift
        if shift is None:
            return weight.to(dtype)
        slot, source = self.probe.slot, matrix_of(weight)
        if isinstance(shift, Tensor):
            z = self.rows(slot, slice(None)).view(weight.shape).to(dtype)
            return weight.to(dtype) + shift.to(dtype) * z
        result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        target = matrix_of(result)
        for part in parts(source):
            torch.add(source[part], self.rows(slot, part), alpha=shift, out=target[part])
        return result

    def forget(self) -> None:
        """Let go of what was kept for the step that has been made."""

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs and cannot draw again."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""
        self.forget()

    def multiply(self, x: Tensor, transposed: bool, bias: Tensor | None) -> Tensor:
        """Return x (W + s z)^T + b, or x (W + s z) + b if transposed."""
        weight, shift = self.current(), self.probe.shift
        cast = torch.is_autocast_enabled(weight.device.type)
        if shift is None or isinstance(shift, Tensor) or transposed or cast:
            moved = self.perturbed(weight.dtype)
            return functional.linear(x, moved.t() if transposed else moved, bias)
        # In bands, each used while it is in the cache: no copy of the weight ever stands whole.
        rows = rows_of(x)
        result = rows.new_empty(rows.shape[0], weight.shape[0])
        for part in parts(weight):
            torch.mm(rows, self._band(weight, part, shift).t(), out=result[:, part])
        if bias is not None:
            result += bias
        return result.unflatten(0, x.shape[:-1])

    def _band(self, matrix: Tensor, part: slice, shift: float) -> Tensor:
        z = self.rows(self.probe.slot, part)
        room = z if z.dtype == wide(matrix) else None  # z is in the cache already
        return torch.add(matrix[part], z, alpha=shift, out=room).to(matrix.dtype)

    # -- the map of the coordinates ----------------------------------------------------------------

    def change(self, delta: Tensor, part: slice) -> Tensor:
        weight = self.current()
        height, width = matrix_shape(weight)
        count = len(range(*part.indices(height)))
        total = torch.zeros(count, width, dtype=delta.dtype, device=weight.device)
        for slot, value in enumerate(delta.tolist()):
            if value:
                total.add_(self.rows(slot, part), alpha=value * self.probe.scale)
        return total

    def expand(self, delta: Tensor) -> Tensor:
        return self.change(delta, slice(None))

    def add_into(self, matrix: Tensor, delta: Tensor) -> None:
        values = {slot: v * self.probe.scale for slot, v in enumerate(delta.tolist()) if v}
        for part in parts(matrix) if values else ():
            if len(values) == 1:
                ((slot, value),) = values.items()
                matrix[part].add_(self.rows(slot, part), alpha=value)
            else:  # all z of W before any is added: a mask depends on it
                matrix[part] += self.change(delta, part)


def perturbation_of(coordinate: Coordinate) -> Perturbation:
    """Return what stands beside a weight."""
    assert isinstance(coordinate.beside, Perturbation)
    return coordinate.beside


def parts(matrix: Tensor) -> Iterable[slice]:
    """Cut a matrix into bands of rows that stay in the cache."""
    height = max(1, BAND // matrix.shape[1])
    return [slice(start, start + height) for start in range(0, matrix.shape[0], height)]


@dataclass(eq=False, kw_only=True)
class LowRank(Perturbation):
    """z = left right of thin factors: x z^T is taken beside x W^T, z itself never formed there."""

    rank: int
    period: int  # steps that what `draw_round` draws is kept for
    held: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)  # step, slot
    rounds: dict[int, tuple[int, tuple[Tensor, ...]]] = field(default_factory=dict)  # slot: round

    @abstractmethod
    def draw(self, slot: int) -> tuple[Tensor, Tensor]:
        """Return left (height, rank) and right (rank, width), with z of variance 1."""

    @abstractmethod
    def draw_round(self, slot: int, round: int) -> tuple[Tensor, ...]:
        """Return the factors that stay the same for a round."""

    def of_round(self, slot: int) -> list[Tensor]:
        """Return them for the round under way, where the weight is and in the dtype of steps."""
        weight, round = self.current(), self.probe.step // self.period
        if slot not in self.rounds or self.rounds[slot][0] != round:
            self.rounds[slot] = (round, self.draw_round(slot, round))
        return [factor.to(weight.device, wide(weight)) for factor in self.rounds[slot][1]]

    def factors(self, slot: int) -> tuple[Tensor, Tensor]:
        place = (self.probe.step, slot)
        if place not in self.held:
            self.held[place] = self.draw(slot)
        return self.held[place]

    def forget(self) -> None:
        self.held.clear()

    def normal(self, rows: int, key: int) -> Tensor:
        """Return a matrix (rows, rank) of normal numbers in the dtype of steps."""
        weight = self.current()
        entries = directions.direction("gaussian", 0, rows * self.rank, key, weight.device)
        return rearrange(entries, "(row r) -> row r", r=self.rank).to(wide(weight))

    def rows(self, slot: int, part: slice) -> Tensor:
        left, right = self.factors(slot)
        return left[part] @ right

    def gather(self, slot: int, ids: Tensor) -> Tensor:
        left, right = self.factors(slot)
        return left[ids] @ right

    def add_into(self, matrix: Tensor, delta: Tensor) -> None:
        for slot, value in enumerate(delta.tolist()):
            if value:
                matrix.addmm_(*self.factors(slot), alpha=value * self.probe.scale)

    def add_to(self, y: Tensor, x: Tensor, transposed: bool) -> Tensor:
        """Return y + s x z^T (or s x z if transposed), for y = x W^T; y may be overwritten."""
        shift = self.probe.shift
        if shift is None:
            return y
        left, right = (factor.to(x.dtype) for factor in self.factors(self.probe.slot))
        first, second = (left.t(), right.t()) if transposed else (right, left)
        thin = functional.linear(x, first)
        if isinstance(shift, Tensor):
            return y + shift.to(y.dtype) * functional.linear(thin, second)
        if y.dtype == wide(y) and y.is_contiguous():
            flat = y.view(-1, y.shape[-1])  # a view: it is written
            flat.addmm_(rows_of(thin), second.t(), alpha=shift)
            return y
        return (y.to(wide(y)) + shift * functional.linear(thin, second)).to(y.dtype)


def spread(weight: Tensor, rank: int) -> float:
    """Return the factor that gives U Z V^T of orthonormal U, V entries of variance 1."""
    height, width = matrix_shape(weight)
    return math.sqrt(height * width) / rank
