"""Tensors in fewer bits: activations in 8 or 4 with a range per group of channels, masks in 1."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

CHUNK = 1 << 18  # entries packed at a time: temporaries that stay in the cache, and in the heap


GROUP = 128  # channels that share a range, at most: 8 bytes of range on 512 of float32


class Form(NamedTuple):
    """How kept tensors stand for one of this shape, stride and dtype.

    bits: 8 or 4: codes, lowest value and step of each group. 1: a mask, the value where it is set.
    """

    bits: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Packed(NamedTuple):
    """A form and the tensors that are kept for it."""

    form: Form
    tensors: tuple[Tensor, ...]


def quantise(x: Tensor, bits: int, rows: Tensor, columns: Tensor) -> Packed:
    """Pack a floating tensor, rounded at random so that it is right on average.

    The memory of x is read as rows of its fastest dimension, in groups of at most 128 that divide
    it. Entry (i, j) is rounded by u = (rows[i] + columns[j]) mod 1, where `rows` and `columns` are
    uniform in [0, 1) and repeated as needed.
    """
    flat = flat_of(x)
    width = x.shape[max(_dims(x), key=lambda d: (-x.stride(d), d), default=0)] if x.ndim else 1
    height = flat.numel() // max(1, width)
    count = -(-width // GROUP)
    while count and width % count:
        count += 1
    shape = {"row": height, "group": count, "channel": width // max(1, count)}
    grouped = rearrange(flat, "(row group channel) -> row group channel", **shape)
    low = grouped.amin(-1, keepdim=True)
    levels = (1 << bits) - 1
    step = (grouped.amax(-1, keepdim=True).float() - low) / levels
    if x.dtype != torch.float32:
        step = (step * 1.01).to(x.dtype)  # rounded, but not below: the highest must be reached
    inverse = torch.where(step > 0, 1 / step.float(), 0.0)
    codes = torch.empty(grouped.shape, dtype=torch.uint8, device=x.device)
    for part in _parts(grouped):
        scaled = (grouped[part].float() - low[part]).mul_(inverse[part])
        u = _repeated(rows, part.start, part.stop)[:, None] + _repeated(columns, 0, width)
        codes[part] = scaled.add_(u.frac_().view_as(scaled)).clamp_(max=levels)
    codes = rearrange(codes, "row group channel -> (row group channel)")
    if bits == 4:
        even = functional.pad(codes, (0, codes.numel() % 2))
        pairs = rearrange(even, "(byte half) -> byte half", half=2)
        codes = pairs[:, 0] | (pairs[:, 1] << 4)
    return Packed(_form(bits, x), (codes, low, step))


def mask(x: Tensor) -> Packed:
    """Pack a tensor that has one value besides zero (a mask), exactly."""
    flat = flat_of(x)
    value = flat.amax() if flat.numel() else flat.new_zeros(())
    whole = functional.pad(flat != 0, (0, -flat.numel() % 8))
    set_ = rearrange(whole, "(byte bit) -> byte bit", bit=8)
    places = torch.arange(8, dtype=torch.uint8, device=x.device)
    codes = (set_.to(torch.uint8) << places).sum(1, dtype=torch.uint8)
    return Packed(_form(1, x), (codes, value))


def unpack(form: Form, tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensor that the kept ones stand for."""
    count = math.prod(form.shape)
    if form.bits == 1:
        codes, value = tensors
        places = torch.arange(8, dtype=torch.uint8, device=codes.device)
        set_ = rearrange((codes[:, None] >> places) & 1, "byte bit -> (byte bit)")
        flat = set_[:count].to(form.dtype) * value
    else:
        codes, low, step = tensors
        if form.bits == 4:
            codes = rearrange([codes & 15, codes >> 4], "half byte -> (byte half)")[:count]
        flat = torch.empty(count, dtype=form.dtype, device=codes.device)
        size = count // max(1, low.numel())
        # Views: `into` is written.
        into, grouped = (t.view(*low.shape[:-1], size) for t in (flat, codes))
        for part in _parts(into):
            into[part] = grouped[part].float().mul_(step[part]).add_(low[part])
    return flat.as_strided(form.shape, form.stride)


def flat_of(x: Tensor) -> Tensor:
    """Return the entries of x in the order of its memory, or of its indices if that has gaps."""
    if fills(x):
        return x.detach().as_strided((x.numel(),), (1,), x.storage_offset())
    return x.detach().reshape(-1)


def fills(x: Tensor) -> bool:
    """Whether x covers its storage, each entry once."""
    return x.numel() * x.element_size() == x.untyped_storage().nbytes() and _dense(x)


def _dense(x: Tensor) -> bool:
    expected = 1
    for d in sorted(_dims(x), key=x.stride):
        if x.stride(d) != expected:
            return False
        expected *= x.shape[d]
    return True


def _dims(x: Tensor) -> list[int]:
    return [d for d in range(x.ndim) if x.shape[d] != 1]


def _form(bits: int, x: Tensor) -> Form:
    stride = x.stride() if fills(x) else torch.empty(x.shape, device="meta").stride()
    return Form(bits, tuple(x.shape), stride, x.dtype)


def _parts(x: Tensor) -> Iterator[slice]:
    """Cut x into rows of at most CHUNK entries."""
    size = CHUNK if x.device.type == "cpu" else CHUNK << 6
    height = max(1, size * len(x) // max(1, x.numel()))
    return (slice(i, min(i + height, len(x))) for i in range(0, len(x), height))


def _repeated(u: Tensor, start: int, stop: int) -> Tensor:
    if stop <= len(u):
        return u[start:stop]
    return u[torch.arange(start, stop, device=u.device) % len(u)]
