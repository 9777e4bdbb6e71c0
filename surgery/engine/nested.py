"""Optimizers around optimizers: what they write into parameters after the inner step."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch.optim import Optimizer

from surgery.errors import OptimizerError, listed
from surgery.weights import copies, shards
from surgery.weights.coordinate import Coordinate, Whole
from surgery.weights.sites import Site


class Nested:
    """met: optimizer -> steps made before its first one. inner: id of a parameter -> its version
    after the inner step of the one under way."""

    def __init__(self) -> None:
        self.met: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self.inner: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Nested.__init__(self)

    def begin(self, optimizer: Optimizer, step: int) -> None:
        """Note that the step of an optimizer begins that is inside of no other's."""
        self.met.setdefault(optimizer, step)
        self.inner.clear()

    def inside(self, coordinates: Iterable[Coordinate]) -> None:
        """Note that a step inside of it has ended."""
        own = {each.parameter for each in coordinates if each.active}
        self.inner = {id(parameter): shards.version(parameter) for parameter in own}

    def check(
        self, optimizer: Optimizer, sites: Iterable[Site], others: Sequence[Optimizer]
    ) -> None:
        """Raise OptimizerError if it has put values of its own into what has begun since its first
        step: what it keeps is of something else. others: those inside."""
        shared = any(optimizer.state is other.state for other in others)
        if not self.inner or (optimizer.state and not shared):
            return
        late = [
            (site, each)
            for site in sites
            for each in site.coordinates
            if each.active and not isinstance(each.rule, Whole)
            if each.rule.since > self.met[optimizer]
            if shards.version(each.parameter) != self.inner.get(id(each.parameter))
        ]
        for site, each in late:
            copies.take_back(site, each)
        if late:
            kind = type(optimizer).__name__
            names = listed([each.name for _, each in late])
            raise OptimizerError(
                f"{kind} writes values of its own (such as slow weights) into {names}. These "
                f"began to be trained after {kind} had taken the values, which belong to others. "
                f"The weights are as before this step. Let {kind} keep such values in "
                "optimizer.state[parameter], made when first needed: that state is freed with each "
                f"round. Or leave {kind} out."
            )
