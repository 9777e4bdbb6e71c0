"""LISA: layerwise importance sampled AdamW. arXiv 2403.17919 (NeurIPS 2024).

Embeddings and head are trained always. Every K steps, freeze all blocks and draw gamma of the N_L
blocks uniformly, without replacement: inclusion probabilities {1, gamma/N_L, ..., gamma/N_L, 1}.
Unlike the published code, the optimizer state of a block that leaves is freed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from surgery.passkit import (
    Precision,
    Rounds,
    Targets,
    check_types,
    coordinate_of,
    demand,
    noise,
    register,
    whole_blocks,
)


@register("lisa")
@dataclass(frozen=True, kw_only=True)
class Lisa:
    """Options of LISA: blocks trained at a time, steps in a round, and which parameters at all.

    `targets` restricts what is trained, inside the blocks and outside of them (embeddings, final
    norm, head), by PEFT's matching rules. precision: of what is trained of 16-bit weights, as in
    `Misa`.
    """

    saves = ("gradients", "optimizer", "activations")

    layers: int = 2
    period: int = 20
    precision: Precision = "auto"
    targets: Targets = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        demand(self.layers >= 1, self, f"layers={self.layers} must be at least 1.")
        demand(self.period >= 1, self, f"period={self.period} is a number of steps, at least 1.")

    def start(self, model: nn.Module) -> Rounds:
        """Plan the rounds on a model; changes nothing. Raises OptionError, TargetError."""
        units, outside = whole_blocks(model, self.targets, "lisa", self.precision)
        too_many = f"layers={self.layers}, but the model has {len(units)} blocks to draw from."
        demand(self.layers <= len(units), self, too_many)
        return Rounds(
            name="lisa",
            units=units,
            period=self.period,
            draw=UniformBlocks(names=tuple(units), options=self),
            always=tuple(coordinate_of(model, n, precision=self.precision) for n in outside),
            total=sum(p.numel() for p in model.parameters()),
        )


@dataclass(frozen=True, kw_only=True)
class UniformBlocks:
    """gamma blocks of N_L, each set equally likely."""

    names: Sequence[str]
    options: Lisa

    def __call__(self, round: int) -> list[str]:
        return noise.shuffled(self.names, self.options.seed, "lisa", round)[: self.options.layers]
