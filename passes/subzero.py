"""SubZero: two forwards in random subspaces. arXiv 2410.08989 (ICCV 2025).

As MeZO, with z = U Z V^T sqrt(out in) / r for each matrix (out, in): U (out, r) and V (in, r)
orthonormal, uniformly random, drawn in every `period` steps, Z (r, r) normal, drawn in each
(Algorithm 1; the factor, which gives entries of variance 1, is in the authors' code). Vectors are
perturbed as in MeZO. Forward takes x z^T as thin products beside x W^T.
"""

from __future__ import annotations

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
    spread,
    wide,
)


@register("subzero")
@dataclass(frozen=True, kw_only=True)
class SubZero(Decaying):
    """Options of SubZero; see `ZerothOrder` and `Decaying`.

    rank: the rank of a direction (r). period: the number of steps that U and V are kept for.
    noise: the distribution of z for vectors, and for matrices that are too thin for r.
    """

    saves = ("gradients", "optimizer", "activations")
    thin = True

    rank: int = 24
    period: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        demand(self.rank >= 1, self, f"rank={self.rank} must be at least 1.")
        demand(self.period >= 1, self, f"period={self.period} must be at least 1 step.")

    def beside(self, name: str, owner: nn.Module, method: TwoPoint) -> Perturbation:
        weight = owner.get_parameter(name.rpartition(".")[2])
        if weight.ndim < 2 or min(matrix_shape(weight)) <= self.rank:
            return super().beside(name, owner, method)
        return Framed(
            name=name, owner=owner, probe=method, rank=self.rank, period=self.period, options=self
        )


@dataclass(eq=False, kw_only=True)
class Framed(LowRank):
    options: SubZero

    def draw(self, slot: int) -> tuple[Tensor, Tensor]:
        left, right = self.of_round(slot)
        weight = self.current()
        return self.normal(self.rank, self.key(slot, "Z"), left, weight.dtype), right

    def draw_round(self, slot: int, round: int) -> tuple[Tensor, ...]:
        left, right = (
            noise.orthonormal(
                self.normal(n, noise.bits(self.options.seed, side, self.name, round, slot))
            ).to(wide(self.current()))
            for side, n in zip("UV", matrix_shape(self.current()), strict=True)
        )
        return left * spread(self.current(), self.rank), right.t()
