"""Random directions: one number for each entry of a weight, a pure function of (key, place).

Integer arithmetic modulo 2^64 and a table: the same on every device, in whatever pieces.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, TypeAlias

import torch
from einops import rearrange
from torch import Tensor

WORDS = 64  # whose bits stand one after the other: long rows to vectorise over
BLOCK = 64 * WORDS  # signs in them

Kind: TypeAlias = Literal["rademacher", "gaussian"]


def mixed(places: Tensor, key: int) -> Tensor:
    """Turn places (int64) into 64 random bits each, in place: SplitMix64 (Steele et al., 2014)."""
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
    words = mixed(torch.arange(first * WORDS, last * WORDS, device=device), key)
    shifts = torch.arange(32, dtype=torch.int32, device=device)[:, None]
    halves = rearrange(words.view(torch.int32), "(block half) -> block 1 half", half=2 * WORDS)
    lifted = (halves << shifts).view(torch.float32)
    one = torch.ones((), device=device)
    signs = torch.copysign(one, lifted, out=lifted)  # in place: it is in the cache
    signs = rearrange(signs, "block bit half -> (block bit half)")
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
