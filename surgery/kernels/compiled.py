"""A function that is compiled for the sizes that it meets, and which code is right for which."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.compat import inductor


class Compiled:
    """A function of tensors and integers, compiled for whatever sizes it meets.

    static: for the sizes of its first call, and once for all others. Static sizes make the faster
    code, and most runs have only those; when lengths change there are two compilations.
    """

    def __init__(self, function: Callable[..., Any], count: bool, static: bool) -> None:
        self.function, self.count, self.static = function, count, static
        self.known: dict[Any, Callable[..., Any]] = {}  # by exact sizes
        self.made: dict[Any, list[inductor.Made]] = {}  # for all sizes of a pattern
        self.failed: set[Any] = set()  # patterns
        self.constant: frozenset[int] = frozenset()  # places of integers that code depends on

    def __call__(self, *args: Tensor | int) -> Any:
        first = self.static and not self.known
        run = None if first else self.known.get(self._sizes(args))
        if run is None:
            run = self._static(args) if first else self._dynamic(args)
            self.known[self._sizes(args)] = run
        return run(*args)

    def _sizes(self, args: Sequence[Tensor | int]) -> tuple[object, ...]:
        return tuple(
            (a.shape, a.stride()) if isinstance(a, Tensor) else a if i in self.constant else None
            for i, a in enumerate(args)
        )

    def _static(self, args: Sequence[Tensor | int]) -> Callable[..., Any]:
        self.constant = frozenset(i for i, a in enumerate(args) if not isinstance(a, Tensor))
        made = self._compiled(args, dynamic=False)
        return self._plain if made is None else made.run

    def _dynamic(self, args: Sequence[Tensor | int]) -> Callable[..., Any]:
        pattern = _pattern(args)
        if pattern in self.failed:
            return self._plain
        candidates = self.made.setdefault(pattern, [])
        for made in candidates:
            if made.fits(args):
                return made.run
        made = self._compiled(args, dynamic=True)
        if made is None:
            self.failed.add(pattern)
            return self._plain
        self.constant |= made.constant
        candidates.append(made)
        return made.run

    def _compiled(self, args: Sequence[Tensor | int], dynamic: bool) -> inductor.Made | None:
        """Return what a compiler makes, None if it fails: torch 2.11 does with some sizes that it
        does not know (CantSplit)."""
        try:
            return inductor.compiled(self.function, args, dynamic, self.count)
        except Exception as error:  # of a compiler, of any kind
            warnings.warn(
                f"a kernel of surgery was not compiled ({inductor.reason(error)}). It "
                "runs operation by operation instead, which is correct but slower.",
                stacklevel=2,
            )
            return None

    def _plain(self, *args: Tensor | int) -> Any:
        with torch.no_grad():
            return self.function(*args)


def _pattern(args: Sequence[Tensor | int]) -> tuple[object, ...]:
    """Return what code for all sizes is right for: which are equal, which 0 or 1, what is laid out
    in gaps, and where places need more than 32 bits."""
    places: dict[int, int] = {0: 0, 1: 1}
    found: list[object] = []
    for value in args:
        if not isinstance(value, Tensor):
            found.append(places.setdefault(value, len(places)))
            continue
        sizes = [places.setdefault(size, len(places)) for size in value.shape]
        order = _order(value)
        found.append((*sizes, order or value.stride(), value.numel() >= 1 << 31))
    return tuple(found)


def _order(t: Tensor) -> tuple[int, ...] | None:
    """Return the dimensions of a tensor as they follow in memory; None if that has gaps."""
    if t.is_contiguous():
        return tuple(range(t.ndim))
    order = sorted(range(t.ndim), key=lambda d: (-t.stride(d), d))
    expected = 1
    for d in reversed(order):
        if t.shape[d] != 1 and t.stride(d) != expected:
            return None
        expected *= t.shape[d]
    return tuple(order)
