"""MeZO: training by two forwards. arXiv 2305.17333 (NeurIPS 2023).

In each step, with a direction z of independent entries (mean 0, variance 1) over all weights,

    g = (L(W + eps z) - L(W - eps z)) / (2 eps),    W <- W - lr g z

(Algorithm 1, SPSA). The optimizer sees one scalar for each direction, whose gradient is g, and its
step moves W along z. z is drawn again wherever it is needed; evaluations change no weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery.passkit import Decaying, register


@register("mezo")
@dataclass(frozen=True, kw_only=True)
class Mezo(Decaying):
    """Options of MeZO: those of `ZerothOrder` and `Decaying`."""

    saves = ("gradients", "optimizer", "activations")
