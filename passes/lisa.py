"""LISA: layerwise importance sampled AdamW. arXiv 2403.17919 (NeurIPS 2024).

Embeddings and head are always trained. Every K steps, freeze all blocks and draw gamma of the N_L
blocks uniformly, without replacement: inclusion probabilities {1, gamma/N_L, ..., gamma/N_L, 1}.
Unlike the published code, the optimizer state of a block that leaves is freed.

OWS, outlier-weighed layerwise sampling, arXiv 2405.18380, draws block l in proportion to its share
of outliers, taken once, before training (OWL, arXiv 2310.05175), over all matrices of the block:

    D_l = mean_ij [A_ij > M mean(A)],    A_ij = abs(W_ij) norm(x_j)

`outlier_ratios` is that. Without batches there is no x: weights="outliers" takes A = abs(W).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from surgery.passkit import (
    Precision,
    Rounds,
    Targets,
    blocks,
    check_types,
    coordinate_of,
    demand,
    noise,
    outliers,
    register,
    whole_blocks,
)


@register("lisa")
@dataclass(frozen=True, kw_only=True)
class Lisa:
    """Options of LISA.

    layers: the number of blocks that are trained in a round. period: the number of optimizer steps
    in a round. weights: how likely each block is drawn: "uniform" draws all alike, "outliers" in
    proportion to a block's share of outliers in magnitude; or give one number for each block, in
    order, such as `outlier_ratios(model, batches)`. threshold: M of "outliers". precision: how
    16-bit weights are trained, as in `Misa`. targets: what is trained at all, inside the blocks and
    outside of them (embeddings, final norm, head), by PEFT's matching rules (default: everything).
    """

    saves = ("gradients", "optimizer", "activations")

    layers: int = 2
    period: int = 20
    weights: Literal["uniform", "outliers"] | Sequence[float] = "uniform"
    threshold: float = 5.0
    precision: Precision = "auto"
    targets: Targets = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        demand(self.layers >= 1, self, f"layers={self.layers} must be at least 1.")
        demand(self.period >= 1, self, f"period={self.period} must be at least 1 step.")
        demand(self.threshold > 0, self, f"threshold={self.threshold} must be above 0.")
        if not isinstance(self.weights, str):
            strange = [w for w in self.weights if not (math.isfinite(w) and w >= 0)]
            demand(not strange, self, f"weights= has {strange[:3]}; each must be finite and >= 0.")

    def start(self, model: nn.Module) -> Rounds:
        """Plan the rounds on a model; changes nothing. Raises OptionError, TargetError."""
        units, outside = whole_blocks(model, self.targets, "lisa", self.precision)
        too_many = f"layers={self.layers}, but the model has {len(units)} blocks to draw from."
        demand(self.layers <= len(units), self, too_many)
        draw = UniformBlocks(names=tuple(units), options=self)
        if self.weights != "uniform":
            draw = WeightedBlocks(ratios=self._ratios(model, list(units)), options=self)
        return Rounds(
            name="lisa",
            units=units,
            period=self.period,
            draw=draw,
            always=tuple(coordinate_of(model, n, precision=self.precision) for n in outside),
            learned={"weights": draw} if isinstance(draw, WeightedBlocks) else {},
            total=sum(p.numel() for p in model.parameters()),
        )

    def _ratios(self, model: nn.Module, names: Sequence[str]) -> dict[str, float]:
        """Return D of each block that is drawn from."""
        if isinstance(self.weights, str):
            found = outliers(model, self.threshold)
            return {name: found[name] for name in names}
        places = blocks(model)
        numbers, count = len(self.weights), len(places)
        wrong = f"weights= has {numbers} numbers, but the model has {count} blocks."
        demand(numbers == count, self, wrong)
        given = dict(zip(places, map(float, self.weights), strict=True))
        likely = sum(given[name] > 0 for name in names)
        few = f"layers={self.layers}, but weights= is above 0 for only {likely} of the blocks."
        demand(likely >= self.layers, self, few)
        return {name: given[name] for name in names}


@dataclass(frozen=True, kw_only=True)
class UniformBlocks:
    """gamma blocks of N_L, each set equally likely."""

    names: Sequence[str]
    options: Lisa

    def __call__(self, round: int) -> list[str]:
        return noise.shuffled(self.names, self.options.seed, "lisa", round)[: self.options.layers]


@dataclass(eq=False, kw_only=True)
class WeightedBlocks:
    """gamma blocks of N_L, one after another in proportion to D, without replacement."""

    ratios: dict[str, float]
    options: Lisa

    def __call__(self, round: int) -> list[str]:
        keys = {
            name: math.log(ratio) + noise.gumbel(self.options.seed, "lisa", round, name)
            for name, ratio in self.ratios.items()
            if ratio > 0
        }
        return sorted(keys, key=lambda name: (-keys[name], name))[: self.options.layers]

    def state(self) -> dict[str, Any]:
        """Return D, which is that of the weights that the run began with."""
        return {"ratios": self.ratios}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""
        self.ratios = dict(state["ratios"])


def outlier_ratios(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], threshold: float = 13.0
) -> list[float]:
    """Return D of each block, with A_ij = abs(W_ij) norm(x_j), x_j the inputs of its Linears.

    batches: a few batches of the model's keyword arguments. `model(**batch)` is run on each,
    without gradients and in evaluation mode; call this before `surgery.apply`. threshold: M, 13 in
    OWS.
    """
    return [*outliers(model, threshold, batches).values()]
