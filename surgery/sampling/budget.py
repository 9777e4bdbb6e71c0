"""Drawing units within a hard budget, without favouring small ones.

Units are drawn one after another in proportion to p, without replacement. The obvious rule, "skip
what does not fit, go on with what does", fills every round with small matrices: at Qwen2.5-7B's
shapes and a budget of 1 %, key and value projections come up 14 times as often as those of the MLP.
Here a unit that was drawn and does not fit is not skipped but *waits*, and comes first in a later
round: each draw leads to exactly one visit, whatever the size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery import noise

BACKLOG = (
    4  # drawn units that may wait at a time: 1 fills 72 to 90 % of the budget, 4 fill 85 to 96 %
)


@dataclass(eq=False, kw_only=True)
class BudgetSampler:
    """Draws sets of units whose sizes add up to at most `limit`.

    sizes: the number of parameters of each unit, none larger than limit. places: the number of the
    transformer block that each unit belongs to. span: draw each round from this many neighbouring
    blocks only.

    A unit that was not drawn for `patience` rounds joins the units that wait. No unit is left out
    for more than `coverage` consecutive rounds.
    """

    sizes: Mapping[str, int]
    limit: int
    seed: int
    places: Mapping[str, int]
    span: int | None = None
    waiting: list[str] = field(default_factory=list)
    visited: dict[str, int] = field(default_factory=dict)  # unit -> round of its last visit

    @property
    def patience(self) -> int:
        # Two rounds running hold more than the budget between them whenever something still waits,
        # so this many rounds suffice for every unit in turn.
        return math.ceil(2 * sum(self.sizes.values()) / self.limit) + 1

    @property
    def coverage(self) -> int:
        """The number of rounds within which every unit is drawn, counted from any round."""
        turns = self.patience if self.span is None else len(self.sizes)
        return self.patience + 1 + turns

    def draw(self, round: int, log_p: Mapping[str, float]) -> list[str]:
        """Return the units of a round, at least one, drawn in proportion to exp(log_p)."""
        self._join_overdue(round)
        keys = {name: log_p[name] + noise.gumbel(self.seed, name, round) for name in self.sizes}
        order = sorted(keys, key=lambda name: (-keys[name], name))
        window = self._window(round, order)
        chosen: dict[str, None] = {}
        used = 0
        for name in list(self.waiting):
            if self.places[name] in window and used + self.sizes[name] <= self.limit:
                chosen[name] = None
                used += self.sizes[name]
                self.waiting.remove(name)
        for name in order:
            if len(self.waiting) >= BACKLOG:
                break
            if name in chosen or name in self.waiting or self.places[name] not in window:
                continue
            if used + self.sizes[name] <= self.limit:
                chosen[name] = None
                used += self.sizes[name]
            else:
                self.waiting.append(name)
        for name in chosen:
            self.visited[name] = round
        return list(chosen)

    def state(self) -> dict[str, Any]:
        """Return which units wait, and when each was last drawn."""
        return {"waiting": self.waiting, "visited": self.visited}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""
        self.waiting, self.visited = list(state["waiting"]), dict(state["visited"])

    def _join_overdue(self, round: int) -> None:
        overdue = [
            name
            for name in self.sizes
            if round - self.visited.get(name, -1) > self.patience and name not in self.waiting
        ]
        lots = noise.shuffled(overdue, self.seed, "overdue", round)
        self.waiting += sorted(lots, key=lambda name: self.visited.get(name, -1))

    def _window(self, round: int, order: list[str]) -> range:
        count = max(self.places.values()) + 1
        if self.span is None or self.span >= count:
            return range(count)
        anchor = self.places[self.waiting[0] if self.waiting else order[0]]
        first, last = max(0, anchor - self.span + 1), min(anchor, count - self.span)
        start = first + noise.bits(self.seed, "window", round) % (last - first + 1)
        return range(start, start + self.span)
