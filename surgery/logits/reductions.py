"""What comes to little: sums over the classes, entries of some of them, the largest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from surgery.compat.tensors import bare, is_fake, is_playing
from surgery.errors import SurgeryError
from surgery.kernels.plan import plan_of
from surgery.logits.calls import name_of
from surgery.logits.chains import in_tiles, under_log_softmax
from surgery.logits.evaluate import each_row, mean, total, without_gradients
from surgery.logits.expression import Rows
from surgery.logits.factored import (
    Factored,
    classes_of,
    count_of,
    current,
    dtype_of,
    factors,
    handles,
    rows_of,
)
from surgery.logits.written import over_classes, pointwise, write


@handles("sum", "mean", "logsumexp", "amax", "amin")
def _reduced(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    t, *rest = args
    dim, keep = _along(rest, kwargs)
    how = {k: v for k, v in kwargs.items() if k not in ("dim", "keepdim")}
    if factors(rest, kwargs) or len(rest) > 2:
        return NotImplemented
    if isinstance(dim, tuple | list):
        if len(dim) != 1:
            return NotImplemented
        (dim,) = dim
    if dim is None:
        return _all(name_of(func), t) if not how else NotImplemented
    if not over_classes(t, dim):
        return NotImplemented
    op = write(t, func, (t, -1), how)
    found = None
    if name_of(func) == "logsumexp":
        none = torch.empty((count_of(t), 0), dtype=torch.long, device=t.device)
        found = in_tiles(op, current(t), none)
    found = _with_gradients(op, t) if found is None else found
    found = found.reshape(rows_of(t))
    return found.unsqueeze(dim) if keep else found


def _with_gradients(op: Any, t: Factored) -> Tensor:
    if dtype_of(t).is_floating_point:
        return each_row(op, count_of(t))
    return without_gradients(op, count_of(t))


def _along(rest: list[Any], kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """Return the arguments dim and keepdim of a reduction."""
    given = dict(zip(("dim", "keepdim"), rest, strict=False)) | kwargs
    return given.get("dim"), given.get("keepdim", False)


def _all(name: str, t: Factored) -> Any:
    if not dtype_of(t).is_floating_point:
        if name != "sum":
            return NotImplemented
        return without_gradients(write(t, torch.sum, (t, -1)), count_of(t)).sum()
    if name == "sum":
        return total(current(t), count_of(t))
    if name == "mean":
        return mean(current(t), count_of(t), count_of(t) * classes_of(t))
    if name in ("amax", "amin"):
        own = getattr(torch, name)
        return own(each_row(write(t, own, (t, -1)), count_of(t)))
    return NotImplemented


@handles("argmax", "argmin", "any", "all", "count_nonzero")
def _chosen(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    t, *rest = args
    name = name_of(func)
    dim, keep = _along(rest, kwargs)
    if dim is None and name in ("any", "all"):
        return func(without_gradients(write(t, getattr(torch, name), (t, -1)), count_of(t)))
    if not isinstance(dim, int) or not over_classes(t, dim):
        return NotImplemented
    found = without_gradients(write(t, getattr(torch, name), (t, -1)), count_of(t))
    found = found.reshape(rows_of(t))
    return found.unsqueeze(dim) if keep else found


@handles("max", "min", "topk", "kthvalue")
def _largest(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    t, *rest = args
    name = name_of(func)
    if "other" in kwargs or factors(rest) or (rest and isinstance(rest[0], Tensor)):
        return pointwise(torch.maximum if name == "max" else torch.minimum, args, kwargs)
    if name in ("max", "min"):
        if not rest and "dim" not in kwargs:
            return _all(f"a{name}", t)
        how = dict(zip(("dim", "keepdim"), rest, strict=False)) | kwargs
        given: tuple[Any, ...] = ()
    else:
        order = ("largest", "sorted") if name == "topk" else ("keepdim",)
        how = dict(zip(("k", "dim", *order), rest, strict=False)) | kwargs
        given = (how.pop("k"),)
    dim = how.pop("dim", -1)
    keep = how.pop("keepdim", False)
    if not over_classes(t, dim) or t.moved:
        return NotImplemented
    own = getattr(torch, name)
    op = write(t, own, (t, *given), {"dim": -1, **how})
    result = without_gradients(op, count_of(t))
    few = name == "topk"
    shapes = [(*rows_of(t), *each.shape[1:]) for each in result]
    values, places = (each.reshape(shape) for each, shape in zip(result, shapes, strict=True))
    if torch.is_grad_enabled() and dtype_of(t).is_floating_point:
        chosen = places if few else places.unsqueeze(-1)
        values = picked(t, chosen)
        values = values if few else values.squeeze(-1)
    if keep:
        values, places = values.unsqueeze(-1), places.unsqueeze(-1)
    return getattr(torch.return_types, name)((values, places))


@handles("gather", "take_along_dim")
def _gather(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    t, *rest = args
    order = ("dim", "index") if name_of(func) == "gather" else ("indices", "dim")
    how = dict(zip(order, rest, strict=False)) | kwargs
    index, dim = how.get("index", how.get("indices")), how.get("dim")
    if not isinstance(t, Factored) or t.moved or not isinstance(index, Tensor):
        return NotImplemented
    if not isinstance(dim, int) or not over_classes(t, dim):
        return NotImplemented
    if index.ndim != len(bare(t)) or tuple(index.shape[:-1]) != rows_of(t):
        return NotImplemented
    return picked(t, index, negative=name_of(func) == "take_along_dim")


def picked(t: Factored, index: Tensor, negative: bool = False) -> Tensor:
    """Return the entries of some classes, index (*rows, k). negative: may count from the end."""
    classes = classes_of(t)
    least = -classes if negative else 0
    wrong = _wrong(index, least, classes, None)
    if wrong is not None:
        raise SurgeryError(
            f"an index is {wrong}, but the logits have {classes} classes, {least} to "
            f"{classes - 1}. Clamp what is masked, index.clamp(min=0), and mask its result; or "
            "check the tokenizer: it may have tokens that the model's head lacks."
        )
    if negative:
        index = torch.where(index < 0, index + classes, index)
    op = write(t, torch.gather, (t, -1))
    op = replace(op, args=(*op.args, Rows(index)))
    logits = under_log_softmax(current(t), (None, torch.float32))
    found = in_tiles(op, logits, index.reshape(count_of(t), index.shape[-1]))
    return (_with_gradients(op, t) if found is None else found).reshape(index.shape)


def check_classes(target: Tensor, classes: int, ignored: int) -> None:
    """Raise SurgeryError for targets that are no classes."""
    wrong = _wrong(target, 0, classes, ignored)
    if wrong is not None:
        raise SurgeryError(
            f"a target is {wrong}, but the logits have {classes} classes, 0 to "
            f"{classes - 1}. Mask rows without a target with the loss's ignore_index (-100), or "
            "check the tokenizer: it may have tokens that the model's head lacks."
        )


def _wrong(index: Tensor, least: int, classes: int, ignored: int | None) -> int | None:
    """Return a class that is none; on an accelerator None: its kernels raise, and nobody waits."""
    if plan_of(index.device).whole or is_fake(index) or is_playing() or not index.numel():
        return None
    wrong = (index < least) | (index >= classes)
    if ignored is not None:
        wrong &= index != ignored
    return int(index[wrong][0]) if bool(wrong.any()) else None
