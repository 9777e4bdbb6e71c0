"""SubZero: two forwards in random subspaces. arXiv 2410.08989 (ICCV 2025).

As MeZO, with z = U Z V^T sqrt(out in) / r for each matrix (out, in): U (out, r) and V (in, r)
orthonormal, uniformly random, drawn in every `period` steps, Z (r, r) normal, drawn in each
(Algorithm 1; the factor, which gives entries of variance 1, is in the authors' code). Vectors are
perturbed as in MeZO. Forward takes x z^T as thin products beside x W^T.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
        return Framed(name=name, owner=owner, probe=method, rank=self.rank, options=self)


@dataclass(eq=False, kw_only=True)
class Framed(LowRank):
    options: SubZero
    frames: dict[int, tuple[int, Tensor, Tensor]] = field(default_factory=dict)  # slot: round, U, V

    def draw(self, slot: int) -> tuple[Tensor, Tensor]:
        weight, round = self.current(), self.probe.step // self.options.period
        if slot not in self.frames or self.frames[slot][0] != round:
            height, width = matrix_shape(weight)
            left, right = (
                noise.orthonormal(
                    self.normal(n, noise.bits(self.options.seed, side, self.name, round, slot))
                ).to(wide(weight))
                for side, n in (("U", height), ("V", width))
            )
            self.frames[slot] = (round, left, right)
        _, left, right = self.frames[slot]
        core = self.normal(self.rank, self.key(slot, "Z")) * spread(weight, self.rank)
        return left.to(core) @ core, right.t().to(core)  # the model may have moved
