"""SubZero: two forwards in random subspaces. arXiv 2410.08989 (ICCV 2025).

As MeZO, with z = U Z V^T sqrt(out in) / r for each matrix (out, in): U (out, r) and V (in, r)
orthonormal, uniformly random, drawn in every `period` steps, Z (r, r) normal, drawn in each
(Algorithm 1; the factor, which gives entries of variance 1, is in the authors' code). Vectors are
perturbed as in MeZO. Forward takes x z^T as thin products beside x W^T.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from passes.lozo import Lozo
from surgery import noise
from surgery.coordinates import matrix_shape, wide
from surgery.perturbation import LowRank, spread
from surgery.registry import register
from surgery.twopoint import TwoPoint


@register("subzero")
@dataclass(frozen=True, kw_only=True)
class SubZero(Lozo):
    """Options of SubZero; see `ZerothOrder` and `Mezo`.

    rank: r. period: steps that U and V are kept for.
    """

    rank: int = 24
    period: int = 1000

    def thin(self, name: str, owner: nn.Module, method: TwoPoint) -> LowRank:
        return Framed(
            name=name, owner=owner, probe=method, rank=self.rank, period=self.period, options=self
        )


@dataclass(eq=False, kw_only=True)
class Framed(LowRank):
    options: SubZero

    def draw(self, slot: int) -> tuple[Tensor, Tensor]:
        left, right = self.of_round(slot)
        core = self.normal(self.rank, self.key(slot, "Z")) * spread(self.current(), self.rank)
        return left @ core, right.t()

    def draw_round(self, slot: int, round: int) -> tuple[Tensor, ...]:
        return tuple(
            noise.orthonormal(
                self.normal(n, noise.bits(self.options.seed, side, self.name, round, slot))
            ).to(wide(self.current()))
            for side, n in zip("UV", matrix_shape(self.current()), strict=True)
        )
