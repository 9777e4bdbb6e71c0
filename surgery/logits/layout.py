"""Rows of logits that are selected or laid out anew: hidden states are, in their place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from surgery.compat.tensors import bare
from surgery.logits.calls import name_of
from surgery.logits.expression import Head, over_rows
from surgery.logits.factored import (
    Factored,
    classes_of,
    current,
    dtype_of,
    factors,
    handles,
    made,
    rows_of,
)
from surgery.logits.reductions import picked


def _laid(t: Factored, change: Callable[[Tensor], Tensor], view: bool = True) -> Factored:
    """Return logits whose rows were changed by a function that leaves the last dimension alone."""
    expression = over_rows(current(t), change)
    # Of a tensor without memory: what becomes of the shape.
    rows = tuple(change(torch.empty((*rows_of(t), 1), device="meta")).shape[:-1])
    view_of = t if view else None
    return made(expression, rows, classes_of(t), dtype_of(t), t.moved, view_of)


def _reshaped(t: Factored, rows: Sequence[int]) -> Factored:
    return _laid(t, lambda own: own.reshape(*rows, own.shape[-1]))


@handles("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "reshape_as")
def _reshape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    t = args[0]
    if not isinstance(t, Factored) or t.moved or any(isinstance(v, torch.dtype) for v in args):
        return NotImplemented
    rest = [torch.empty(bare(v), device="meta") if isinstance(v, Tensor) else v for v in args[1:]]
    shape = func(torch.empty(bare(t), device="meta"), *rest, **kwargs).shape
    classes = classes_of(t)
    if not shape or shape[-1] != classes or math.prod(shape) != math.prod(bare(t)):
        return NotImplemented
    return _reshaped(t, tuple(shape[:-1]))


@handles("transpose", "swapaxes", "swapdims", "permute", "movedim", "mT.get")
def _permute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    t = args[0]
    if not isinstance(t, Factored):
        return NotImplemented
    shape = bare(t)
    # Sizes that tell dimensions apart; of a tensor without memory.
    after = func(
        torch.empty([place + 2 for place in range(len(shape))], device="meta"), *args[1:], **kwargs
    )
    order = [size - 2 for size in after.shape]
    last, ends = len(shape) - 1, [*range(len(shape))]
    there = [0, last, *ends[1:-1]]  # as torch's losses take logits
    back = [0, *ends[2:], 1]
    if (not t.moved and order == there) or (t.moved and order == back):
        rows, moved = rows_of(t), len(shape) > 2 and not t.moved
        return made(current(t), rows, classes_of(t), dtype_of(t), moved, t)
    if t.moved or not order or order[-1] != last:
        return NotImplemented
    return _laid(t, lambda own: own.permute(order))


@handles("getitem")
def _getitem(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    t, index = args
    if not isinstance(t, Factored) or t.moved or factors(index):
        return NotImplemented
    places: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(each, int | slice | Tensor | None) or each is ... for each in places):
        return NotImplemented
    width = [_consumed(each) for each in places]
    rows = len(rows_of(t))
    hidden_by_dots = places.index(...) if any(each is ... for each in places) else None
    if hidden_by_dots is None:
        over = sum(width) > rows
    else:
        over = bool(width[hidden_by_dots + 1 :]) and sum(width[hidden_by_dots + 1 :]) > 0
    last_is_new = hidden_by_dots is not None and index is not ... and index[-1] is None
    if last_is_new or (over and not _is_all(places[-1])):
        return _entries(t, places)
    plain = all(isinstance(each, int | slice | None) or each is ... for each in places)
    return _laid(t, lambda own: own[index], view=plain)


def _consumed(index: Any) -> int:
    """Return how many dimensions a part of an index takes."""
    if index is None or index is ...:
        return 0
    if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
        return index.ndim
    return 1


def _is_all(index: Any) -> bool:
    return isinstance(index, slice) and index == slice(None)


def _entries(t: Factored, places: tuple[Any, ...]) -> Any:
    """Return t[rows, ..., classes], one entry for each of as many indices."""
    shapes = {each.shape for each in places if isinstance(each, Tensor)}
    whole = all(isinstance(each, Tensor) and not each.is_floating_point() for each in places)
    if not whole or len(shapes) != 1 or len(places) != len(rows_of(t)) + 1:
        return NotImplemented
    *rows, classes = places
    if any(each.dtype in (torch.bool, torch.uint8) for each in places):
        return NotImplemented
    if not rows:
        return NotImplemented
    chosen = _laid(t, lambda own: own[tuple(rows)], view=False)
    return picked(chosen, classes.unsqueeze(-1), negative=True).squeeze(-1)


def _row_dim(t: Factored, dim: Any) -> int | None:
    """Return a dimension of the rows, counted from the front; None: it is another."""
    count = len(rows_of(t)) + 1
    if t.moved or not isinstance(dim, int) or dim % count == count - 1:
        return None
    return dim % count


@handles("unbind", "iter", "split", "chunk", "tensor_split")
def _split(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name, t = name_of(func), args[0]
    first = 1 if name in ("unbind", "iter") else 2
    given = args[first] if len(args) > first else kwargs.get("dim", 0)
    dim = _row_dim(t, given)
    if dim is None:
        return NotImplemented
    size = rows_of(t)[dim]
    if name in ("unbind", "iter"):
        found = [_laid(t, partial(_selected, dim, i)) for i in range(size)]
        return iter(found) if name == "iter" else tuple(found)
    how = {k: v for k, v in kwargs.items() if k != "dim"}
    starts = func(torch.arange(size), *args[1:2], **how)
    places = [(int(part[0]) if len(part) else 0, len(part)) for part in starts]
    return tuple(_laid(t, partial(_narrowed, dim, *place)) for place in places)


def _selected(dim: int, place: int, own: Tensor) -> Tensor:
    return own.select(dim, place)


def _narrowed(dim: int, start: int, length: int, own: Tensor) -> Tensor:
    return own.narrow(dim, start, length)


@handles("select", "narrow", "index_select")
def _select(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    t = args[0]
    dim = _row_dim(t, kwargs.get("dim", args[1] if len(args) > 1 else None))
    if dim is None or kwargs or factors(args[2:]):
        return NotImplemented
    rest = args[2:]
    return _laid(t, lambda own: func(own, dim, *_like(rest, own)), name_of(func) != "index_select")


def _like(values: Sequence[Any], own: Tensor) -> list[Any]:
    """Return arguments for a tensor, which may be one without memory."""
    return [v.to(own.device) if isinstance(v, Tensor) else v for v in values]


@handles("cat", "concat", "concatenate")
def _cat(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = args[0]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if not all(isinstance(t, Factored) and not t.moved for t in tensors):
        return NotImplemented
    roots = [current(t) for t in tensors]
    first, place = roots[0], _row_dim(tensors[0], dim)
    heads = [each for each in roots if isinstance(each, Head)]
    same = len(heads) == len(roots) and all(_same_head(heads[0], each) for each in heads)
    if place is None or not isinstance(first, Head) or not same:
        return NotImplemented
    hidden = torch.cat([each.hidden for each in heads], place)
    t = tensors[0]
    return made(first.on(hidden), hidden.shape[:-1], classes_of(t), dtype_of(t))


def _same_head(one: Head, other: Head) -> bool:
    same = one.weight is other.weight and one.bias is other.bias
    return same and one.dtype == other.dtype
