"""Logits as a tensor that knows hidden states and head, and is computed where it must be only.

`Factored` is a torch.Tensor with a shape, a dtype and a device, and no memory. What torch's
functions do with it is written down until something small is asked for: a loss, log-probabilities
of some classes, a sum over the classes. That is computed in chunks of rows, forward and backward.
Anything else makes it whole, says so once, and finds a plain tensor from then on.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from surgery.compat.dynamo import past
from surgery.compat.tensors import bare, each, plainly, wrapper
from surgery.errors import SurgeryError
from surgery.kernels.autocast import cast_now
from surgery.logits.calls import changes, name_of, spelt
from surgery.logits.expression import (
    Expression,
    Head,
    check_unchanged,
    detached,
    leaves_of,
)
from surgery.logits.linked import Linked, computed, entered, is_foreign

# What is done about a call of a name: (function, args, kwargs) -> result, or NotImplemented: the
# logits among the arguments become whole.
Handler = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
H = TypeVar("H", bound=Handler)

_HANDLERS: dict[str, Handler] = {}
_VALUES = frozenset(f"{name}.get" for name in ("T", "H", "mH", "real", "imag"))  # of entries
_SAID: set[str] = set()
_LARGE = 1 << 20  # bytes of logits from which on it is worth a word that they are made whole


def handles(*names: str) -> Callable[[H], H]:
    """Say what is done about calls of these names."""

    def add(handler: H) -> H:
        _HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return add


class Factored(Tensor):
    """Logits (*rows, V), or what was made of them that has one entry a class.

    expression: of these rows. moved: the classes stand behind the first dimension, as torch's
    losses take them: (rows, V, *rows). family: how often they, or views of theirs, were changed in
    place. seen: how often of that they know. settled: the plain tensor that they have become. link:
    what autograd's graph knows of the expression. read: whether something was made of them.
    """

    expression: Expression
    moved: bool
    family: list[int]
    seen: int
    settled: Tensor | None
    link: list[Expression | None]
    read: bool

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _called(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # From C++, past all of the above, and past autograd.
        args, kwargs = each(lambda t: whole(t).detach() if is_factored(t) else t, (args, kwargs))
        return func(*args, **(kwargs or {}))

    def holds(self) -> list[Tensor]:
        """Return the tensors that the logits are made of."""
        tensors = [t for leaf in leaves_of(self.expression) for t in leaf.tensors]
        return [t for t in tensors if t is not None]

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return repr(whole(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return whole(self).detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return whole(self).__deepcopy__(memo)


@past  # Dynamo would trace it where a model's forward is cut behind its head
def _called(func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    name, kwargs = name_of(func), kwargs or {}
    found = factors(args, kwargs)
    if torch.is_grad_enabled() and (name in _HANDLERS or not name.endswith(".get")):
        for t in found:
            if t.settled is None and is_foreign(t):
                t.settled = entered(t)
    if any(t.settled is not None for t in found):
        if changes(name) and _is_settled(args[0]):
            become(args[0], args[0].settled)
        args, kwargs = each(lambda t: whole(t) if _is_settled(t) else t, (args, kwargs))
        found = factors(args, kwargs)
    if found and name.endswith(".get") and name not in _VALUES and name not in _HANDLERS:
        with plainly():
            return func(*args, **kwargs)
    if found and name in _HANDLERS and kwargs.get("out") is None:
        made = _HANDLERS[name](func, *spelt(name, args, kwargs))
        if made is not NotImplemented:
            for t in found:
                t.read = t.read or isinstance(made, Tensor | tuple)
            return made
    if found and name in ("register_hook", "retain_grad") and found[0].read:
        raise SurgeryError(
            f"{name} of logits of which something was computed already: chunked_loss would leave "
            "that out. Call it before anything is computed of them, or leave logits to the loop: "
            "passes.ChunkedLoss(outside=False)."
        )
    if found:
        _say(name, found[0])
        if changes(name) and isinstance(args[0], Factored):
            return change(func, args, kwargs)
        args, kwargs = each(settle, (args, kwargs))
    return func(*args, **kwargs)


def is_factored(value: Any) -> bool:
    """Whether a value is logits that were not computed."""
    return isinstance(value, Factored)


def _is_settled(value: Any) -> bool:
    return isinstance(value, Factored) and value.settled is not None


def factors(args: Any, kwargs: Any = None) -> list[Factored]:
    """Return the logits among the arguments of a call."""
    found: list[Factored] = []
    each(lambda t: found.append(t) if isinstance(t, Factored) else None, (args, kwargs))
    return found


def factored(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, tokens: int | None = None
) -> Factored:
    """Return the logits h W^T + b of hidden (*rows, D), weight (V, D) and bias (V,). tokens: rows
    that are computed at a time, None: by the device."""
    dtype = cast_now(hidden.device.type).dtype
    head = Head(hidden=hidden, weight=weight, bias=bias, dtype=dtype, tokens=tokens)
    return made(head, hidden.shape[:-1], weight.shape[0], dtype or hidden.dtype)


def made(
    expression: Expression,
    rows: Sequence[int],
    classes: int,
    dtype: torch.dtype,
    moved: bool = False,
    view_of: Factored | None = None,
) -> Factored:
    """Return an expression as a tensor (*rows, classes). view_of: what changes with it."""
    shape = (rows[0], classes, *rows[1:]) if moved else (*rows, classes)
    if not (torch.is_grad_enabled() and dtype.is_floating_point):
        expression = detached(expression)  # of comparisons, whatever becomes of them
    tensors = [t for leaf in leaves_of(expression) for t in leaf.tensors if t is not None]
    link: list[Expression | None] = [expression]
    if torch.is_grad_enabled() and dtype.is_floating_point:
        found: Any = Linked.apply((Factored, link, shape, dtype, moved), *tensors)
    else:
        found = wrapper(Factored, shape, dtype, tensors[0].device)
    found.expression, found.moved, found.settled, found.link = expression, moved, None, link
    found.family = [0] if view_of is None else view_of.family
    found.seen, found.read = found.family[0], False
    return found


def rows_of(t: Factored) -> tuple[int, ...]:
    """Return the shape of the rows of logits."""
    shape = bare(t)
    return (shape[0], *shape[2:]) if t.moved else shape[:-1]


def classes_of(t: Factored) -> int:
    """Return the number of classes."""
    return bare(t)[1 if t.moved else -1]


def count_of(t: Factored) -> int:
    """Return the number of rows."""
    return math.prod(rows_of(t))


def dtype_of(t: Tensor) -> torch.dtype:
    """Return a dtype, of logits too."""
    with plainly():
        return t.dtype


def current(t: Factored) -> Expression:
    """Return what logits are. Raises SurgeryError if a view of theirs, or what they are computed
    from, was changed since."""
    _check_views(t)
    check_unchanged(t.expression)
    return t.expression


def _check_views(t: Factored) -> None:
    if t.seen != t.family[0]:
        raise SurgeryError(
            "these logits were changed in place through a view of theirs (logits[:, :-1] /= t), "
            "which chunked_loss cannot follow. Write logits = logits[:, :-1] / t, or leave "
            "logits to the loop: passes.ChunkedLoss(outside=False)."
        )


def whole(t: Any) -> Any:
    """Return logits as a plain tensor; anything else as it is."""
    if not isinstance(t, Factored):
        return t
    if t.settled is not None:
        _check_views(t)
        return t.settled
    value = computed(current(t)).expand(*rows_of(t), classes_of(t))
    return value.movedim(-1, 1) if t.moved else value


def settle(t: Any) -> Any:
    """Return logits as a plain tensor, which they then are; anything else as it is."""
    if not isinstance(t, Factored):
        return t
    value = whole(t)
    if torch.is_grad_enabled():
        t.settled = value
    return value


def change(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Change logits in place as a whole."""
    t, *rest = args
    if not isinstance(t, Factored):
        return NotImplemented
    with torch.enable_grad():  # without gradients, what is changed still has its own
        value = whole(t).clone()
    func(value, *rest, **kwargs)
    return become(t, value)


def become(t: Factored, value: Tensor) -> Factored:
    """Let logits be what was made of them in place."""
    _check_views(t)
    if isinstance(value, Factored):
        t.expression = value.expression
    else:
        t.settled = value
    t.link[0] = None
    t.family[0] += 1
    t.seen = t.family[0]
    return t


def _say(name: str, t: Factored) -> None:
    shape = bare(t)
    size = math.prod(shape) * dtype_of(t).itemsize
    if name in _SAID or size < _LARGE:
        return
    _SAID.add(name)
    warnings.warn(
        f"chunked_loss: {name} needs all logits of shape {shape}, {size / 1e6:,.1f} MB. The "
        "losses of torch.nn.functional, log_softmax with gather, logsumexp, argmax, topk and the "
        "like are computed in chunks. passes.ChunkedLoss(outside=False) leaves logits alone.",
        stacklevel=3,
    )
