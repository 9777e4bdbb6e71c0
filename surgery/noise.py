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
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
BLOCK = 4096  # signs of 64 words, one bit of each after the other: long rows to vectorise over

Kind: TypeAlias = Literal["rademacher", "gaussian"]


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
    places = torch.arange(start, start + count, dtype=torch.int64, device=device)
    x = places.mul_(0x9E3779B9)
    for half in (key & _WORD, key >> 32):
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


@torch.no_grad()
def round_into(target: Tensor, exact: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Write the matrix `exact` (float32) into `target` (bfloat16 or float16), rounded at random.

    Each entry goes to one of its two neighbours, with probabilities that make it right on average.
    Entry (i, j) is rounded by u = (rows[i] + columns[j]) mod 2^16: uniform, and independent of any
    other entry's, for the price of one word per row and column.
    """
    u = (rows[:, None] + columns[None, :]).bitwise_and_(0xFFFF)
    if target.dtype == torch.bfloat16:  # the upper half of float32: add below the cut, cut
        pattern = exact.contiguous().view(torch.int32) + u.to(torch.int32)
        target.copy_(pattern.bitwise_and_(-0x10000).view(torch.float32))
        return
    quantum = _quantum(exact, target.dtype)
    quanta = exact / quantum
    below = quanta.floor()
    # Compared, not added: quanta + u would round up to the next number where u is close to 1.
    below += (quanta - below) > u * 2.0**-16
    target.copy_(below.mul_(quantum))


@torch.no_grad()
def before_rounding(rounded: Tensor, change: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return what `round_into` started from, in float32, if it wrote start + change, and start was
    of the same 16-bit dtype: as the words are the same, one number of the grid at `rounded` fits.

    A start of a finer grid, of less than half the size, is found to the nearest of that grid once,
    and to the bit from then on.
    """
    u = (rows[:, None] + columns[None, :]).bitwise_and_(0xFFFF) * 2.0**-16
    value = rounded.float()
    quantum = _quantum(value, rounded.dtype)
    quanta = (value - change).div_(quantum)
    if rounded.dtype == torch.bfloat16:  # positive numbers were rounded up by u, negative ones down
        sign = torch.where(value < 0, -1.0, 1.0)
        return (quanta.mul_(sign) - u).ceil_().mul_(sign).mul_(quantum)
    return (quanta + u).floor_().mul_(quantum)


def _quantum(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance of neighbours in a dtype, at each number."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact)[1].clamp_(min=math.frexp(info.tiny)[1])
    return torch.ldexp(torch.full_like(exact, info.eps / 2), exponent)


# -- directions: one number for each entry of a weight -------------------------------------------


def mixed(places: Tensor, key: int) -> Tensor:
    """Turn places (int64) into 64 random bits each, in place: SplitMix64 (Steele et al., 2014).

    The same on every device: integer arithmetic modulo 2^64.
    """
    x = places.mul_(_signed(0x9E3779B97F4A7C15)).add_(_signed(key))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1))
        x = x.mul_(_signed(factor))
    return x.bitwise_xor_((x >> 31).bitwise_and_((1 << 33) - 1))


def direction(kind: Kind, start: int, count: int, key: int, device: Any = "cpu") -> Tensor:
    """Return entries `start` to `start + count` of a random direction, float32, of variance 1.

    Signs from the bits of 64-bit words, 64 from each; or normal numbers, four from each word, by a
    table of 65,536 quantiles. Entry i is a function of (key, i) only.
    """
    if kind == "gaussian":
        return _quantiles(str(device)).index_select(0, sixteen(start, count, key, device))
    first, last = start // BLOCK, -(-(start + count) // BLOCK)
    words = mixed(torch.arange(first * 64, last * 64, device=device), key)
    shifts = torch.arange(32, dtype=torch.int32, device=device).view(32, 1)
    lifted = (words.view(torch.int32).view(-1, 1, 128) << shifts).view(torch.float32)
    one = torch.ones((), device=device)
    signs = torch.copysign(one, lifted, out=lifted).view(-1)  # in place: it is in the cache
    return signs[start - first * BLOCK :][:count]


def direction_at(kind: Kind, places: Tensor, key: int) -> Tensor:
    """Return the entries of `direction` at any places (int64)."""
    if kind == "gaussian":
        return _quantiles(str(places.device))[sixteen_at(places, key)]
    half, bit = places & 127, (places >> 7) & 31
    found = mixed((places >> 12) * 64 + (half >> 1), key)
    found = (found >> (32 * (half & 1) + 31 - bit)).bitwise_and_(1)
    return found.mul_(-2).add_(1).to(torch.float32)


def sixteen(start: int, count: int, key: int, device: Any = "cpu") -> Tensor:
    """Return numbers `start` to `start + count` of a sequence of random 16-bit numbers, int32."""
    first = start // 4
    words = mixed(torch.arange(first, (start + count + 3) // 4, device=device), key)
    found = words.view(torch.int16)[start - 4 * first :][:count]
    return found.to(torch.int32).bitwise_and_(0xFFFF)


def sixteen_at(places: Tensor, key: int) -> Tensor:
    """Return the numbers of `sixteen` at any places (int64)."""
    return (mixed(places >> 2, key) >> (16 * (places & 3))).bitwise_and_(0xFFFF)


@lru_cache
def _quantiles(device: str) -> Tensor:
    """Return 65,536 equally likely values of the normal distribution, scaled to variance 1."""
    found = torch.special.ndtri((torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16))
    return (found / found.square().mean().sqrt()).float().to(device)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
