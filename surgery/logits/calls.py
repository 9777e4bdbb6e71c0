"""Calls of torch's functions: one spelling of their arguments; which change a tensor in place."""

from __future__ import annotations

from typing import Any

_ALIASES = {"axis": "dim", "keepdims": "keepdim"}
_OPERATORS = frozenset(
    ["iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"]
    + ["ilshift", "irshift", "setitem"]
)


def name_of(func: Any) -> str:
    """Return what a function of torch is called: "add" for `Tensor.__add__`, "shape.get"."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__"):
        return f"{getattr(func.__self__, '__name__', '')}.{name.strip('_')}"
    return name.strip("_") if name.startswith("__") else name


def spelt(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call as torch's documentation has them, the first one by place."""
    if name.endswith(".get"):
        return args, kwargs
    kwargs = {_ALIASES.get(key, key): value for key, value in kwargs.items()}
    first = next((key for key in ("input", "self", "tensors") if key in kwargs), None)
    if not args and first is not None and name not in ("where", "cross_entropy", "nll_loss"):
        args = (kwargs.pop(first),)
    return args, kwargs


def changes(name: str) -> bool:
    """Whether a function changes its first argument in place."""
    return name in _OPERATORS or name.endswith((".set", "_"))
