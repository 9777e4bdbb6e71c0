"""Rounding at random into 16 bits, and what was there before.

Words decide, one for each row and column: the same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from surgery import noise


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


def carried(
    matrix: Tensor,
    gone: Tensor | None,
    change: Tensor,
    keep: Tensor | None,
    rows: Tensor,
    columns: Tensor,
) -> None:
    """Take a 16-bit matrix from start + gone to start + change, in place, by the same words.

    gone: None if the matrix is the start itself. keep: the share of it that stays, if not all. The
    change is overwritten.
    """
    if gone is None:
        exact = change.add_(matrix.float() if keep is None else matrix.float().mul_(keep))
    else:
        exact = before_rounding(matrix, gone, rows, columns).add_(change)
    round_into(matrix, exact, rows, columns)


def words(like: Tensor, count: int, low: int, high: int) -> Tensor:
    """Return random 32-bit words (count,) as int64, `noise.words` of a key in halves."""
    return noise.stream(0, count, (low, high), like.device)


def carried_by(
    matrix: Tensor, old: Tensor | None, new: Tensor, keep: Tensor | None, words: Tensor,
    change: Callable[..., Tensor], *more: Any,
) -> None:  # fmt: skip
    """Take a whole 16-bit matrix from start + change(old) to start + change(new), in place.

    words: of its rows, then of its columns. change: of (matrix, coordinates, *more).
    """
    rows, columns = words[: matrix.shape[0]], words[matrix.shape[0] :]
    gone = None if old is None else change(matrix, old, *more)
    carried(matrix, gone, change(matrix, new, *more), keep, rows, columns)


def added(matrix: Tensor, new: Tensor, change: Callable[..., Tensor], *more: Any) -> None:
    """Add change(new) to a whole matrix of the dtype of steps, in place."""
    matrix += change(matrix, new, *more)


def _quantum(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance of neighbours in a dtype, at each number."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact)[1].clamp_(min=math.frexp(info.tiny)[1])
    return torch.ldexp(torch.full_like(exact, info.eps / 2), exponent)
