"""LOZO: two forwards along low-rank directions. arXiv 2410.07698 (ICLR 2025).

As MeZO, with z = U V^T / sqrt(r) for each matrix (out, in): U (out, r) normal, drawn in each step,
V (in, r) normal, drawn in every `period` steps (Algorithm 1). Vectors are perturbed as in MeZO.
Forward takes x z^T as two thin products beside x W^T. The paper perturbs by U V^T, whose entries
have variance r: its eps is ours divided by sqrt(r), its g ours times sqrt(r); the step -lr g z is
its step with U V^T / r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from surgery.passkit import (
    Decaying,
    LowRank,
    Perturbation,
    TwoPoint,
    demand,
    matrix_shape,
    noise,
    register,
)


@register("lozo")
@dataclass(frozen=True, kw_only=True)
class Lozo(Decaying):
    """Options of LOZO; see `ZerothOrder` and `Decaying`.

    rank: the rank of a direction (r). period: the number of steps that V is kept for. noise: the
    distribution of z for vectors, and for matrices that are too thin for r.
    """

    saves = ("gradients", "optimizer", "activations")
    thin = True

    rank: int = 2
    period: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        demand(self.rank >= 1, self, f"rank={self.rank} must be at least 1.")
        demand(self.period >= 1, self, f"period={self.period} must be at least 1 step.")

    def beside(self, name: str, owner: nn.Module, method: TwoPoint) -> Perturbation:
        weight = owner.get_parameter(name.rpartition(".")[2])
        if weight.ndim < 2 or min(matrix_shape(weight)) <= self.rank:
            return super().beside(name, owner, method)
        return Lazy(
            name=name, owner=owner, probe=method, rank=self.rank, period=self.period, options=self
        )


@dataclass(eq=False, kw_only=True)
class Lazy(LowRank):
    options: Lozo

    def draw(self, slot: int) -> tuple[Tensor, Tensor]:
        height, _ = matrix_shape(self.current())
        (right,) = self.of_round(slot)
        return self.normal(height, self.key(slot, "U"), dtype=self.current().dtype), right

    def draw_round(self, slot: int, round: int) -> tuple[Tensor, ...]:
        _, width = matrix_shape(self.current())
        key = noise.bits(self.options.seed, "V", self.name, round, slot)
        return (self.normal(width, key).t() / math.sqrt(self.rank),)
