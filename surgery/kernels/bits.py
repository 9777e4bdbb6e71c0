"""Tensors in fewer bits: activations in 8 or 4 with a range per group of channels, masks in 1."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from surgery.kernels.fused import compiles, launch
from surgery.kernels.plan import bands, plan_of

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
    if compiles(flat) and flat.numel():
        found = launch(_quantised, flat, *shape.values(), bits == 4, rows, columns, static=True)
        return Packed(_form(bits, x), found)
    grouped = rearrange(flat, "(row group channel) -> row group channel", **shape)
    levels = (1 << bits) - 1
    low, step, inverse = _ranges(grouped, levels)
    codes = torch.empty(grouped.shape, dtype=torch.uint8, device=x.device)
    for part in _parts(grouped):
        scaled = (grouped[part].float() - low[part]).mul_(inverse[part])
        u = _repeated(rows, part.start, part.stop)[:, None] + _repeated(columns, 0, width)
        codes[part] = scaled.add_(u.frac_().view_as(scaled)).clamp_(max=levels)
    codes = rearrange(codes, "row group channel -> (row group channel)")
    return Packed(_form(bits, x), (_halved(codes) if bits == 4 else codes, low, step))


def mask(x: Tensor) -> Packed:
    """Pack a tensor that has one value besides zero (a mask), exactly."""
    flat = flat_of(x)
    found = (
        launch(_mask, flat, static=True)
        if flat.numel()
        else (flat.to(torch.uint8), flat.new_zeros(()))
    )
    return Packed(_form(1, x), found)


def unpack(form: Form, tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensor that the kept ones stand for."""
    count = math.prod(form.shape)
    if form.bits == 1:
        flat = launch(_unmasked, *tensors, count, form.dtype, static=True)
    elif compiles(tensors[0]) and count:
        flat = launch(_restored, *tensors, count, form.bits == 4, form.dtype, static=True)
    else:
        codes, low, step = tensors
        codes = _unhalved(codes, count) if form.bits == 4 else codes
        flat = torch.empty(count, dtype=form.dtype, device=codes.device)
        size = count // max(1, low.numel())
        # Views: `into` is written.
        into, grouped = (t.view(*low.shape[:-1], size) for t in (flat, codes))
        for part in _parts(into):
            into[part] = grouped[part].float().mul_(step[part]).add_(low[part])
    return flat.as_strided(form.shape, form.stride)


# -- kernels: plain reshapes, since compilers trace them ------------------------------------------


def _quantised(
    flat: Tensor, height: int, count: int, size: int, half: bool, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grouped, levels = flat.view(height, count, size), 15 if half else 255
    low, step, inverse = _ranges(grouped, levels)
    row = torch.arange(height, device=flat.device) % rows.shape[0]
    column = torch.arange(count * size, device=flat.device) % columns.shape[0]
    u = (rows[row][:, None] + columns[column][None, :]).frac().view(height, count, size)
    codes = (grouped.float() - low) * inverse + u
    codes = codes.clamp(max=levels).to(torch.uint8).view(-1)
    return _halved(codes) if half else codes, low, step


def _restored(
    codes: Tensor, low: Tensor, step: Tensor, count: int, half: bool, dtype: torch.dtype
) -> Tensor:
    codes = _unhalved(codes, count) if half else codes
    found = codes.view(low.shape[0], low.shape[1], -1).float() * step + low
    return found.to(dtype).view(-1)


def _mask(flat: Tensor) -> tuple[Tensor, Tensor]:
    whole = functional.pad((flat != 0).to(torch.uint8), (0, -flat.shape[0] % 8)).view(-1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=flat.device)
    return (whole << places).sum(1, dtype=torch.uint8), flat.amax()


def _unmasked(codes: Tensor, value: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    set_ = ((codes[:, None] >> places) & 1).view(-1)
    return set_[:count].to(dtype) * value


def _ranges(grouped: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return lowest value, step and 1 / step of each group (..., 1)."""
    low = grouped.amin(-1, keepdim=True)
    step = (grouped.amax(-1, keepdim=True).float() - low) / levels
    if grouped.dtype != torch.float32:
        step = (step * 1.01).to(grouped.dtype)  # rounded, but not below: the highest is reached
    return low, step, torch.where(step > 0, 1 / step.float(), 0.0)


def _halved(codes: Tensor) -> Tensor:
    pairs = functional.pad(codes, (0, codes.shape[0] % 2)).view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def _unhalved(codes: Tensor, count: int) -> Tensor:
    return torch.stack([codes & 15, codes >> 4], 1).view(-1)[:count]


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
    """Cut x into rows of as many entries as are packed at a time."""
    return bands(len(x), x.numel() // max(1, len(x)), plan_of(x.device).packed)


def _repeated(u: Tensor, start: int, stop: int) -> Tensor:
    if stop <= len(u):
        return u[start:stop]
    return u[torch.arange(start, stop, device=u.device) % len(u)]
