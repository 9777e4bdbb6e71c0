"""Tensors in fewer bits: activations in 8 or 4 with a range per group of channels, masks in 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

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
    matrix = flat.view(-1, width)
    count = -(-width // GROUP)
    while width % count:
        count += 1
    grouped = matrix.view(len(matrix), count, -1).to(torch.float32)
    low, high = torch.aminmax(grouped, dim=-1, keepdim=True)
    levels = (1 << bits) - 1
    step = (high - low) / levels
    if x.dtype != torch.float32:
        step = (step * 1.01).to(x.dtype).float()  # not below: the highest value must be reached
    scaled = (grouped - low).mul_(torch.where(step > 0, 1 / step, 0.0))
    u = _repeated(rows, len(matrix))[:, None] + _repeated(columns, width)
    scaled += u.frac_().view_as(scaled)
    codes = scaled.clamp_(max=levels).to(torch.uint8).flatten()
    if bits == 4:
        pairs = functional.pad(codes, (0, codes.numel() % 2)).view(-1, 2)
        codes = pairs[:, 0] | (pairs[:, 1] << 4)
    return Packed(_form(bits, x), (codes, low.to(x.dtype), step.to(x.dtype)))


def mask(x: Tensor) -> Packed:
    """Pack a tensor that has one value besides zero (a mask), exactly."""
    flat = flat_of(x)
    value = flat.amax() if flat.numel() else flat.new_zeros(())
    set_ = functional.pad(flat != 0, (0, -flat.numel() % 8)).view(-1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=x.device)
    codes = (set_.to(torch.uint8) << places).sum(1, dtype=torch.uint8)
    return Packed(_form(1, x), (codes, value))


def unpack(form: Form, tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensor that the kept ones stand for."""
    count = math.prod(form.shape)
    if form.bits == 1:
        codes, value = tensors
        places = torch.arange(8, dtype=torch.uint8, device=codes.device)
        flat = ((codes[:, None] >> places) & 1).flatten()[:count].to(form.dtype) * value
    else:
        codes, low, step = tensors
        if form.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], 1).flatten()[:count]
        grouped = codes.view(*low.shape[:-1], -1)
        flat = torch.addcmul(low.float(), grouped, step.float()).to(form.dtype).flatten()
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


def _repeated(u: Tensor, count: int) -> Tensor:
    times = -(-count // len(u)) if len(u) else 1
    return (u.repeat(times) if times > 1 else u)[:count]
