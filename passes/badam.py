"""BAdam: block coordinate descent with Adam inside. arXiv 2404.02827 (NeurIPS 2024).

Partition the parameters into D blocks (the transformer blocks); train one block for K steps
with Adam, moments starting at 0 and cleared at the switch; go on to the next. Embeddings, final
norm and head are frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from surgery.passkit import (
    Precision,
    Rounds,
    Targets,
    check_types,
    demand,
    noise,
    register,
    whole_blocks,
)


@register("badam")
@dataclass(frozen=True, kw_only=True)
class BAdam:
    """Options of BAdam.

    order: "random" (a new permutation for every sweep), "ascending" or "descending". period: the
    number of optimizer steps with each block. precision: how 16-bit weights are trained, as in
    `Misa`. targets: what is trained inside the blocks, by PEFT's matching rules (default: all of
    it).
    """

    saves = ("gradients", "optimizer", "activations")

    order: Literal["random", "ascending", "descending"] = "random"
    period: int = 50
    precision: Precision = "auto"
    targets: Targets = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        demand(self.period >= 1, self, f"period={self.period} must be at least 1 step.")

    def start(self, model: nn.Module) -> Rounds:
        """Plan the rounds on a model; changes nothing. Raises OptionError, TargetError."""
        units, _ = whole_blocks(model, self.targets, "badam", self.precision)
        return Rounds(
            name="badam",
            units=units,
            period=self.period,
            draw=OneBlock(names=tuple(units), options=self),
            total=sum(p.numel() for p in model.parameters()),
        )


@dataclass(frozen=True, kw_only=True)
class OneBlock:
    """Every block once in each sweep."""

    names: Sequence[str]
    options: BAdam

    def __call__(self, round: int) -> list[str]:
        sweep, place = divmod(round, len(self.names))
        order = list(self.names)
        if self.options.order == "random":
            order = noise.shuffled(order, self.options.seed, "badam", sweep)
        elif self.options.order == "descending":
            order.reverse()
        return [order[place]]
