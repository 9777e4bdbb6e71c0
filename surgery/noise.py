"""Counter-based random numbers: every draw is a pure function of its labels.

There is no state to save, to synchronise between ranks or to disturb: the value for
(seed, weight name, period) is the same on every machine and in any order of evaluation, and
the global generators of Python, NumPy and torch are never touched.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable


def bits(seed: int, *labels: str | int) -> int:
    """Return 64 random bits for the labels (BLAKE2b of their length-prefixed text)."""
    text = "".join(f"{len(part)}:{part}" for part in map(str, (seed, *labels)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniform(seed: int, *labels: str | int) -> float:
    """Return a number of the open interval (0, 1), on a grid of 2^-53."""
    return ((bits(seed, *labels) >> 11) + 0.5) * 2.0**-53


def gumbel(seed: int, *labels: str | int) -> float:
    """Return a standard Gumbel variate, -log(-log u).

    Sorting names by log p + gumbel, largest first, draws them without replacement in proportion
    to p (Plackett-Luce; Yellott 1977).
    """
    return -math.log(-math.log(uniform(seed, *labels)))


def shuffled(names: Iterable[str], seed: int, *labels: str | int) -> list[str]:
    """Return the names in an order that depends on (seed, labels) and on the set of names only."""
    return sorted(names, key=lambda name: (bits(seed, *labels, name), name))
