"""Random directions: one number for each entry of a weight, a pure function of (key, place).

Integer arithmetic modulo 2^64 and a table: the same on every device, in whatever pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import torch
from einops import rearrange
from torch import Tensor

from surgery.compat.tensors import off_stage

WORDS = 64  # whose bits stand one after the other: long rows to vectorise over
BLOCK = 64 * WORDS  # signs in them

Kind: TypeAlias = Literal["rademacher", "gaussian"]


def mixed(places: Tensor, key: int) -> Tensor:
    """Turn places (int64) into 64 random bits each, in place: SplitMix64 (Steele et al., 2014).

    key: 64 bits as an int64, see `signed`.
    """
    x = places.mul_(signed(0x9E3779B97F4A7C15)).add_(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1))
        x = x.mul_(signed(factor))
    return x.bitwise_xor_((x >> 31).bitwise_and_((1 << 33) - 1))


def direction(kind: Kind, start: int, count: int, key: int, device: Any = "cpu") -> Tensor:
    """Return entries `start` to `start + count` of a random direction, float32, of variance 1.

    Signs from the bits of 64-bit words, 64 from each; or normal numbers, four from each word, by a
    table of 65,536 quantiles. Entry i is a function of (key, i) only.
    """
    if kind == "gaussian":
        return _quantiles(str(device)).index_select(0, sixteen(start, count, key, device))
    first, last = start // BLOCK, -(-(start + count) // BLOCK)
    words = mixed(torch.arange(first * WORDS, last * WORDS, device=device), signed(key))
    shifts = torch.arange(32, dtype=torch.int32, device=device)[:, None]
    halves = rearrange(words.view(torch.int32), "(block half) -> block 1 half", half=2 * WORDS)
    lifted = (halves << shifts).view(torch.float32)
    one = torch.ones((), device=device)
    signs = torch.copysign(one, lifted, out=lifted)  # in place: it is in the cache
    signs = rearrange(signs, "block bit half -> (block bit half)")
    return signs[start - first * BLOCK :][:count]


def direction_at(kind: Kind, places: Tensor, key: int, table: Tensor | None = None) -> Tensor:
    """Return the entries of `direction` at any places (int64), for a `signed` key.

    table: `table_of(kind, device)`.
    """
    if kind == "gaussian":
        if table is None:
            table = _quantiles(str(places.device))
        return table[sixteen_at(places, key)]
    half, bit = places & 127, (places >> 7) & 31
    found = mixed((places >> 12) * 64 + (half >> 1), key)
    found = (found >> (32 * (half & 1) + 31 - bit)).bitwise_and_(1)
    return found.mul_(-2).add_(1).to(torch.float32)


def sixteen(start: int, count: int, key: int, device: Any = "cpu") -> Tensor:
    """Return numbers `start` to `start + count` of a sequence of random 16-bit numbers, int32."""
    first = start // 4
    words = mixed(torch.arange(first, (start + count + 3) // 4, device=device), signed(key))
    found = words.view(torch.int16)[start - 4 * first :][:count]
    return found.to(torch.int32).bitwise_and_(0xFFFF)


def sixteen_at(places: Tensor, key: int) -> Tensor:
    """Return the numbers of `sixteen` at any places (int64), for a `signed` key."""
    return (mixed(places >> 2, key) >> (16 * (places & 3))).bitwise_and_(0xFFFF)


def table_of(kind: Kind, device: torch.device) -> Tensor | None:
    """Return the table that a kind of direction is read from, if it is."""
    return _quantiles(str(device)) if kind == "gaussian" else None


# -- whole tensors: kernels of one launch ----------------------------------------------------------

# A mask: z, the weight's entries (flat, in the dtype of steps), their places and tensors of its own
# -> z, with zeros.
Mask: TypeAlias = Callable[..., Tensor]


def whole(
    weight: Tensor, key: int, kind: Kind, table: Tensor | None, mask: Mask | None, *more: Any
) -> Tensor:
    """Return z, flat, for all entries of a weight; `more` goes to the mask."""
    places = torch.arange(weight.numel(), device=weight.device)
    z = direction_at(kind, places, key, table)
    if mask is None:
        return z
    full = torch.promote_types(weight.dtype, torch.float32)
    return mask(z.to(full), weight.reshape(-1).to(full), places, *more)


def moved(weight: Tensor, shift: Tensor, dtype: torch.dtype, *z: Any) -> Tensor:
    """Return W + s z in a dtype, added in at least float32. z: the further arguments of `whole`."""
    full = torch.promote_types(weight.dtype, torch.float32)
    total = weight.reshape(-1).to(full) + shift.to(full) * whole(weight, *z).to(full)
    return total.to(dtype).view(weight.shape)


def moved_by(
    weight: Tensor, scale: Tensor, dtype: torch.dtype, key: int, table: Tensor | None
) -> Tensor:
    """Return W + scale z in a dtype, as `moved`. scale: broadcasts, in the dtype of steps."""
    z = whole(weight, key, "gaussian", table, None).view(weight.shape)
    return (weight.to(scale.dtype) + scale * z.to(scale.dtype)).to(dtype)


def summed(
    weight: Tensor, values: Tensor, scale: Tensor, slots: Tensor, keys: tuple[int, ...], *z: Any
) -> Tensor:
    """Return scale sum_k a_k z_k, shaped as the weight, in the dtype of the values (K,).

    slots: the k that are in the sum, with their keys. z: the arguments of `whole` after the key.
    """
    total, factors = values.new_zeros(weight.numel()), values[slots] * scale
    for place, key in enumerate(keys):
        total = total + whole(weight, key, *z).to(values.dtype) * factors[place]
    return total.view(weight.shape)


def rows_moved(
    rows: Tensor, ids: Tensor, weight: Tensor, shift: Tensor, key: int, kind: Kind,
    table: Tensor | None, mask: Mask | None, *more: Any,
) -> Tensor:  # fmt: skip
    """Return rows (n, width) of a weight, read by their numbers (n,), with s z of those rows."""
    width = weight.shape[-1]
    full = torch.promote_types(weight.dtype, torch.float32)
    places = (ids[:, None] * width + torch.arange(width, device=ids.device)).reshape(-1)
    z = direction_at(kind, places, key, table).to(full)
    flat = rows.reshape(-1).to(full)
    if mask is not None:
        z = mask(z, flat, places, *more)
    return (flat + shift.to(full) * z).to(rows.dtype).view(rows.shape)


@lru_cache
def _quantiles(device: str) -> Tensor:
    """Return 65,536 equally likely values of the normal distribution, scaled to variance 1."""
    with off_stage():
        found = torch.special.ndtri((torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16))
        return (found / found.square().mean().sqrt()).float().to(device)


def normals(
    key: int, rows: int, rank: int, dtype: torch.dtype, table: Tensor, frame: Tensor | None
) -> Tensor:
    """Return a matrix (rows, rank) of normal numbers, or its product with a frame (n, rows)."""
    places = torch.arange(rows * rank, device=table.device)
    found = direction_at("gaussian", places, key, table)
    found = found.view(rows, rank)  # not einops: traced by a compiler
    return (found if frame is None else frame @ found.to(frame.dtype)).to(dtype)


def signed(word: int) -> int:
    """Return 64 bits as the int64 that has them."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)
