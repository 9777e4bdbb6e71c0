"""Directions of thin factors: z = left right, which forward takes beside x W^T."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from surgery.graph.linear import rows_of
from surgery.kernels import directions, plan
from surgery.kernels.fused import launch
from surgery.weights.matrices import matrix_shape, wide
from surgery.zeroth_order.direction import Perturbation


@dataclass(eq=False, kw_only=True)
class LowRank(Perturbation):
    """A direction z = left right of thin factors; forward computes x z^T without forming z."""

    rank: int
    period: int  # steps that what `draw_round` draws is kept for
    held: dict[tuple[int, int], dict[torch.dtype, tuple[Tensor, Tensor]]] = field(
        default_factory=dict
    )  # step, slot: the factors in each dtype that they were asked for
    rounds: dict[int, tuple[int, tuple[Tensor, ...]]] = field(default_factory=dict)  # slot: round
    cast: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # slot: right, and cast

    @abstractmethod
    def draw(self, slot: int) -> tuple[Tensor, Tensor]:
        """Return left (height, rank) and right (rank, width), with z of variance 1."""

    @abstractmethod
    def draw_round(self, slot: int, round: int) -> tuple[Tensor, ...]:
        """Return the factors that stay the same within a round."""

    def of_round(self, slot: int) -> tuple[Tensor, ...]:
        """Return them for the current round, on the weight's device and in the dtype of steps."""
        weight, round = self.current(), self.probe.step // self.period
        if slot not in self.rounds or self.rounds[slot][0] != round:
            self.rounds[slot] = (round, self.draw_round(slot, round))
        found = self.rounds[slot][1]
        if any(f.device != weight.device or f.dtype != wide(weight) for f in found):
            found = tuple(factor.to(weight.device, wide(weight)) for factor in found)
            self.rounds[slot] = (round, found)
        return found

    def factors(self, slot: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Return left and right of this step, in the dtype of steps or in another.

        Their numbers are of the weight's dtype: forward and step move along the same z.
        """
        weight = self.current()
        own, wanted = weight.dtype, dtype or wide(weight)
        found = self.held.setdefault((self.probe.step, slot), {})
        if own not in found:
            with torch.autocast(weight.device.type, enabled=False):
                left, right = self.draw(slot)
            found[own] = left.to(own), self._cast(slot, right)
        if wanted not in found:
            left, right = found[own]
            found[wanted] = left.to(wanted), right.to(wanted)
        return found[wanted]

    def _cast(self, slot: int, right: Tensor) -> Tensor:
        """Return a right factor in the dtype of the weight; it stays the same for a round."""
        known = self.cast.get(slot)
        if known is None or known[0] is not right:
            known = self.cast[slot] = (right, right.to(self.current().dtype))
        return known[1]

    def forget(self) -> None:
        self.held.clear()

    def drawn(self, slot: int) -> tuple[Any, ...] | None:
        return None

    def pure(self) -> tuple[Any, ...] | None:
        own = self.current().dtype
        pairs = {slot: self.factors(slot, own) for slot in self.slots}
        factors = [factor for pair in pairs.values() for factor in pair]
        return (_products, *self.factors_of(pairs), *factors) if pairs else None

    def normal(
        self,
        rows: int,
        key: int,
        frame: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return a matrix (rows, rank) of normal numbers, or the product of a frame (n, rows) with
        it. dtype: that of steps by default."""
        weight = self.current()
        table = directions.table_of("gaussian", weight.device)
        args = (directions.signed(key), rows, self.rank, dtype or wide(weight), table, frame)
        return launch(directions.normals, *args)

    def rows(self, slot: int, part: slice) -> Tensor:
        left, right = self.factors(slot)
        return left[part] @ right

    def gather(self, slot: int, ids: Tensor) -> Tensor:
        left, right = self.factors(slot)
        return left[ids] @ right

    def add_into(self, matrix: Tensor, delta: Tensor) -> None:
        values = delta.tolist()
        for slot in self.slots:
            if values[slot]:
                matrix.addmm_(*self.factors(slot), alpha=values[slot] * self.probe.scale)

    def add_to(self, y: Tensor, x: Tensor, transposed: bool) -> Tensor:
        """Return y + s x z^T (or s x z if transposed), for y = x W^T; y may be overwritten."""
        shift = self.probe.shift
        if shift is None:
            return y
        left, right = self.factors(self.probe.slot, x.dtype)
        first, second = (left.t(), right.t()) if transposed else (right, left)
        thin = functional.linear(x, first)
        if isinstance(shift, Tensor):
            return y + shift.to(y.dtype) * functional.linear(thin, second)
        # A product into 16 bits adds in float32 and rounds once, on accelerators.
        exact = y.dtype == wide(y) or plan.plan_of(y.device).whole
        if exact and y.is_contiguous() and thin.dtype == y.dtype:
            flat = y.view(-1, y.shape[-1])  # a view: it is written
            flat.addmm_(rows_of(thin), second.t(), alpha=shift)
            return y
        return (y.to(wide(y)) + shift * functional.linear(thin, second)).to(y.dtype)


def _products(_: Tensor, delta: Tensor, scale: Tensor, slots: Tensor, *factors: Tensor) -> Tensor:
    values = (delta[slots] * scale).unbind()
    pairs = zip(factors[::2], factors[1::2], values, strict=True)
    found = [(left.to(delta) * value) @ right.to(delta) for left, right, value in pairs]
    return found[0] if len(found) == 1 else torch.stack(found).sum(0)


def spread(weight: Tensor, rank: int) -> float:
    """Return the factor that gives U Z V^T of orthonormal U, V entries of variance 1."""
    height, width = matrix_shape(weight)
    return math.sqrt(height * width) / rank
