"""Counter-based random numbers: every draw is a pure function of its labels.

There is no state to save, to synchronise between ranks or to disturb: the value for
(seed, weight name, period) is the same on every machine and in any order of evaluation, and
the global generators of Python, NumPy and torch are never touched.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


@lru_cache(maxsize=1 << 14, typed=True)  # a step asks for the key of a weight several times
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


def orthonormal(normal: Tensor) -> Tensor:
    """Return a uniformly random orthonormal frame (n, r), float64, from normal numbers (n, r)."""
    # The signs make the distribution uniform: LAPACK's own convention would not.
    q, upper = torch.linalg.qr(normal.double())
    return q * upper.diagonal().sign()


def words(count: int, seed: int, *labels: str | int, start: int = 0, device: Any = "cpu") -> Tensor:
    """Return random 32-bit words as int64, numbers `start` to `start + count` of these labels.

    The i-th is a function of (seed, labels, i) only.

    Two rounds of the integer hash "lowbias32" (C. Wellons, hash-prospector) over a Weyl sequence,
    each keyed by half of the labels' 64 bits; the same on every device.
    """
    key = bits(seed, *labels)
    return stream(start, count, (key & _WORD, key >> 32), device)


def stream(start: int, count: int, halves: Iterable[int | Tensor], device: Any) -> Tensor:
    """Return `words` of labels whose `bits` are given in halves, the lower one first."""
    places = torch.arange(start, start + count, dtype=torch.int64, device=device)
    x = places.mul_(0x9E3779B9)
    for half in halves:
        x = x.add_(half).bitwise_and_(_WORD)
        x = (x ^ (x >> 16)).mul_(0x7FEB352D).bitwise_and_(_WORD)
        x = (x ^ (x >> 15)).mul_(0x846CA68B).bitwise_and_(_WORD)
        x = x ^ (x >> 16)
    return x


def normal(shape: tuple[int, ...], seed: int, *labels: str | int) -> Tensor:
    """Return standard normal numbers in float32, on the CPU, by inverting their distribution.

    In pieces of a megaword, so that temporaries stay below 64 MiB; values do not depend on that.
    """
    found = torch.empty(math.prod(shape))
    for start in range(0, len(found), 1 << 20):
        count = min(1 << 20, len(found) - start)
        # In float64: in float32 the largest words would round to 1, whose number is infinite.
        u = (words(count, seed, *labels, start=start).double() + 0.5) * 2.0**-32
        found[start : start + count] = torch.special.ndtri(u)
    return found.view(shape)
