"""What is done with logits entry by entry, or along the classes of a row: written down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from surgery.compat.fsdp import only_announces
from surgery.compat.tensors import plainly
from surgery.kernels.autocast import cast_now
from surgery.logits.calls import name_of
from surgery.logits.expression import Columns, Head, Op, Rows, detached, leaves_of
from surgery.logits.factored import (
    Factored,
    become,
    change,
    classes_of,
    current,
    dtype_of,
    factors,
    handles,
    made,
    rows_of,
)

_CASTS = ("float", "double", "half", "bfloat16", "type_as")
# One entry of the result for each entry of the operands, which are broadcast.
POINTWISE = frozenset(
    ["add", "radd", "sub", "rsub", "mul", "rmul", "div", "truediv", "rtruediv", "rdiv", "neg"]
    + ["exp", "log", "log1p", "expm1", "log2", "exp2", "tanh", "sigmoid", "logsigmoid", "softplus"]
    + ["pow", "rpow", "square", "sqrt", "rsqrt", "reciprocal", "abs", "clamp", "clip", "relu"]
    + ["clamp_min", "clamp_max", "maximum", "minimum", "where", "masked_fill", "nan_to_num"]
    + ["eq", "ne", "lt", "le", "gt", "ge", "isfinite", "isnan", "isinf", "isneginf", "isposinf"]
    + ["logical_and", "logical_or", "logical_not", "and", "or", "invert", "logaddexp", "xlogy"]
    + [*_CASTS]
)
IN_PLACE = {
    **{f"{name}_": name for name in ("add", "sub", "mul", "div", "masked_fill", "clamp", "exp")},
    **{"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "tanh_": "tanh"},
}
LOOKS = frozenset(
    ["size", "dim", "numel", "nelement", "is_floating_point", "is_complex", "is_signed", "len"]
    + ["element_size", "get_device", "ndimension", "hash", "is_inference", "is_contiguous"]
    + ["_is_view", "is_shared"]
)


@handles(*LOOKS)
def _look(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with plainly():
        return func(*args, **kwargs)


@handles("data.get", "detach")
def _detach(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    (t,) = args
    with torch.no_grad():
        return made(detached(current(t)), rows_of(t), classes_of(t), dtype_of(t), t.moved, t)


@handles("contiguous", "clone")
def _same(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    t = args[0]
    view_of = t if name_of(func) == "contiguous" else None
    return made(current(t), rows_of(t), classes_of(t), dtype_of(t), t.moved, view_of)


@handles("register_hook")
def _hook(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    t, hook = args
    if not only_announces(hook):
        return NotImplemented
    for leaf in leaves_of(current(t)):
        if isinstance(leaf, Head):
            leaf.before.append(hook)
    return None


def operand(value: Any, rows: tuple[int, ...], classes: int) -> Any:
    """Return an operand of an operation on logits as an expression; NotImplemented: unfit."""
    if not isinstance(value, Tensor):
        return value
    if isinstance(value, Factored):
        fits = rows_of(value) == rows and classes_of(value) == classes
        return current(value) if fits else NotImplemented
    if not value.ndim:
        return Columns(value)
    last = value.shape[-1]
    lead = (1,) * (len(rows) + 1 - value.ndim) + tuple(value.shape[:-1])
    if len(lead) != len(rows) or last not in (1, classes):
        return NotImplemented
    if any(size not in (1, own) for size, own in zip(lead, rows, strict=True)):
        return NotImplemented
    if all(size == 1 for size in lead):
        return Columns(value.reshape(value.shape[-1:]))
    return Rows(value.expand(*rows, last))


def write(
    t: Factored, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> Any:
    """Return a call, by rows of `t`, as an expression; NotImplemented if an operand is unfit."""
    rows, classes = rows_of(t), classes_of(t)
    values = [operand(value, rows, classes) for value in args]
    named = {key: operand(value, rows, classes) for key, value in (kwargs or {}).items()}
    if any(value is NotImplemented for value in (*values, *named.values())):
        return NotImplemented
    with plainly():
        cast = cast_now(t.device.type)
    return Op(name=name_of(func), function=func, args=tuple(values), kwargs=named, cast=cast)


def result_dtype(op: Op, args: Any, kwargs: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype of a call's result: asked of tensors of one entry, which are real ones where
    autocast decides."""

    def tiny(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        with plainly():
            device = "meta" if op.cast.dtype is None else t.device
            return torch.ones((1,) * t.ndim, dtype=t.dtype, device=device)

    with torch.no_grad():
        return op.function(*map(tiny, args), **{k: tiny(v) for k, v in kwargs.items()}).dtype


@handles(*POINTWISE)
def pointwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Write down an operation entry by entry."""
    tensors = factors(args, kwargs)
    others = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    moved = tensors[0].moved
    if (moved and len(others) > 1) or (name_of(func) == "where" and len(args) + len(kwargs) == 1):
        return NotImplemented
    op = write(tensors[0], func, args, kwargs)
    if op is NotImplemented:
        return NotImplemented
    t = tensors[0]
    dtype = result_dtype(op, args, kwargs)
    if name_of(func) in _CASTS and args[0] is t and dtype == dtype_of(t):
        return t
    return made(op, rows_of(t), classes_of(t), dtype, moved)


@handles("to", "type", "cuda", "cpu")
def _to(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    t, *where = args
    dtype, name = None, name_of(func)
    if name == "type":
        if not (where or kwargs):
            with plainly():
                return torch.empty(0, dtype=t.dtype, device=t.device).type()
        if isinstance(where[0], str | type):
            like: Any = where[0]
            where = [torch.empty(0).type(like)]
    for value in (*where, *kwargs.values()):
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, Tensor):
            dtype = value.dtype
        elif not isinstance(value, bool | None | torch.memory_format) and _elsewhere(t, value):
            return NotImplemented
    with plainly():
        if name in ("cuda", "cpu") and t.device.type != name:
            return NotImplemented
    if dtype is None or dtype == dtype_of(t):
        return t
    return pointwise(torch.Tensor.to, (t, dtype), {})


def _elsewhere(t: Factored, device: Any) -> bool:
    with plainly():
        own = t.device
    there = torch.device(device)
    return there.type != own.type or there.index not in (None, own.index)


@handles(*IN_PLACE)
def _in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    t = args[0]
    if not isinstance(t, Factored):
        return NotImplemented
    if t.requires_grad and not torch.is_grad_enabled():
        return change(func, args, kwargs)
    base = getattr(torch, IN_PLACE[name_of(func)])
    result = pointwise(base, args, kwargs)
    if result is NotImplemented or dtype_of(result) != dtype_of(t):
        return change(func, args, kwargs)
    return become(t, result)


@handles("setitem")
def _set(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return change(func, args, kwargs)


@handles("log_softmax", "softmax")
def along(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Write down a softmax over the classes."""
    t, *rest = args
    dim = kwargs.get("dim", rest[0] if rest else None)
    dtype = kwargs.get("dtype") or next((v for v in rest if isinstance(v, torch.dtype)), None)
    if dim is None or not over_classes(t, dim):
        return NotImplemented
    base = functional.log_softmax if name_of(func) == "log_softmax" else functional.softmax
    how = {"dim": -1, "dtype": dtype}
    op = write(t, base, (t,), how)
    return made(op, rows_of(t), classes_of(t), dtype or result_dtype(op, (t,), how), t.moved)


def over_classes(t: Factored, dim: int) -> bool:
    """Whether a dimension of logits is that of the classes."""
    with plainly():
        places = t.ndim
    return dim % places == (1 if t.moved else places - 1)
