"""Sparse-MeZO: two forwards along the small weights only. arXiv 2402.15751 (NeurIPS 2025).

As MeZO, with z replaced by m z: m = (abs(W) <= h), where h is the magnitude below which
`keep_fraction` of each matrix lies (section 3). m is taken from the unperturbed weight wherever z
is, so both evaluations and the update see the same, and it is never stored. (The paper's
pseudocode lacks the absolute value.) With h fixed, a weight that grows beyond it stays for good.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.passkit import (
    Perturbation,
    TwoPoint,
    ZerothOrder,
    demand,
    directions,
    matrix_of,
    matrix_shape,
    noise,
    number,
    register,
    rows_of,
    wide,
)

SAMPLE = 1 << 17  # entries that h is taken from


@register("sparse_mezo")
@dataclass(frozen=True, kw_only=True)
class SparseMezo(ZerothOrder):
    """Options of Sparse-MeZO; see `ZerothOrder`.

    keep_fraction: the share of each matrix (embeddings included) that is trained; norms and biases
    are trained wholly. threshold: whether h is computed once ("fixed", as in the paper) or again
    every `period` steps ("period"). period: the number of optimizer steps between two thresholds.
    mask: "magnitude", or as a control "random": as many entries, fixed, chosen at random.
    """

    saves = ("gradients", "optimizer", "activations")

    keep_fraction: float = 0.2
    threshold: Literal["fixed", "period"] = "fixed"
    period: int = 200
    mask: Literal["magnitude", "random"] = "magnitude"

    def __post_init__(self) -> None:
        super().__post_init__()
        good = 0 < self.keep_fraction <= 1
        demand(good, self, f"keep_fraction={self.keep_fraction} must lie in (0, 1].")
        demand(self.period >= 1, self, f"period={self.period} must be at least 1 step.")

    def beside(self, name: str, owner: nn.Module, method: TwoPoint) -> Perturbation:
        weight = owner.get_parameter(name.rpartition(".")[2])
        if weight.ndim < 2 or self.keep_fraction == 1:
            return super().beside(name, owner, method)
        return Sparse(name=name, owner=owner, probe=method, options=self)


@dataclass(eq=False, kw_only=True)
class Sparse(Perturbation):
    options: SparseMezo
    limit: float | None = None  # h
    above: float = 0.0  # the number after h, in the dtype of steps
    round: int = 0

    def rows(self, slot: int, part: slice) -> Tensor:
        z, weight = super().rows(slot, part), self.current()
        if self.options.mask == "random":
            height, width = matrix_shape(weight)
            start, stop, _ = part.indices(height)
            random = directions.sixteen(
                start * width, (stop - start) * width, self._mask, weight.device
            )
            return z.masked_fill_((random >= self._share).view_as(z), 0.0)
        return self._small(z, rows_of(weight, part))

    def gather(self, slot: int, ids: Tensor) -> Tensor:
        z, weight = super().gather(slot, ids), self.current()
        if self.options.mask == "random":
            places = ids[:, None] * z.shape[1] + torch.arange(z.shape[1], device=ids.device)
            return z.masked_fill_(directions.sixteen_at(places, self._mask) >= self._share, 0.0)
        return self._small(z, weight[ids])

    def mask(self) -> tuple[directions.Mask | None, tuple[Any, ...]]:
        weight = self.current()
        if self.options.mask == "random":
            return _at_random, (self._mask, self._share)
        self._renew()
        return _below, (number(self.above, weight),)

    def _small(self, z: Tensor, weight: Tensor) -> Tensor:
        """Return z where |W| <= h, else 0."""
        self._renew()
        # What backward of hardtanh does, in one sweep; where(|W| <= h) takes 6 times as long.
        full = weight.to(wide(weight))
        return torch.ops.aten.hardtanh_backward(z.to(full.dtype), full, -self.above, self.above)

    def _renew(self) -> None:
        """Take h if it is due: an entry of a sample, so it is a number of the weight's dtype."""
        options = self.options
        now = 0 if options.threshold == "fixed" else self.probe.step // options.period
        if self.limit is None or now != self.round:
            self.round, self.limit = now, self._quantile(now)
            h = torch.tensor(self.limit, dtype=wide(self.current()))
            self.above = torch.nextafter(h, torch.full_like(h, math.inf)).item()

    def state(self) -> dict[str, Any]:
        if self.limit is None:
            return {}
        return {"limit": self.limit, "above": self.above, "round": self.round}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.limit = None
        vars(self).update(state)

    def _quantile(self, round: int) -> float:
        flat = matrix_of(self.current()).flatten()
        if flat.numel() > SAMPLE:
            key = ("threshold", self.name, round)
            flat = flat[
                noise.words(SAMPLE, self.options.seed, *key, device=flat.device) % len(flat)
            ]
        rank = max(1, math.ceil(self.options.keep_fraction * flat.numel()))
        return flat.abs().float().kthvalue(rank).values.item()

    @property
    def _mask(self) -> int:
        return directions.signed(noise.bits(self.options.seed, "mask", self.name))

    @property
    def _share(self) -> int:
        return round(self.options.keep_fraction * (1 << 16))


def _below(z: Tensor, weight: Tensor, places: Tensor, above: Tensor) -> Tensor:
    return z.masked_fill(weight.abs() >= above, 0.0)


def _at_random(z: Tensor, weight: Tensor, places: Tensor, key: int, share: int) -> Tensor:
    return z.masked_fill(directions.sixteen_at(places, key) >= share, 0.0)
