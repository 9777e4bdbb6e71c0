"""What becomes of logits, written down instead of computed: per row, from hidden states and a head.

An expression is a tree over heads z = h W^T + b, tensors with one entry (or one for each class) a
row, and tensors that all rows share. It has one row for each token, and is computed in chunks of
rows. Nodes may be shared: they are computed once in a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter, functional

from surgery.compat.tensors import is_given_back, version_of
from surgery.errors import SurgeryError
from surgery.kernels.autocast import Cast


@dataclass(frozen=True, eq=False, kw_only=True)
class Head:
    """z = h W^T + b. hidden: (*rows, D). weight: (V, D). bias: (V,). dtype: that autocast casts all
    of them to, None: as they are. tokens: rows that are computed at a time, None: by the device.
    before: called before their gradient is computed, with what it begins at."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype | None
    tokens: int | None = None
    before: list[Callable[[Tensor], Tensor | None]] = field(default_factory=list)
    versions: tuple[tuple[int, int, int] | None, ...] = ()
    trained: tuple[Tensor | None, ...] = ()  # the parameters, which optimizers know

    def __post_init__(self) -> None:
        _remember(self)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.hidden, self.weight, self.bias

    def on(self, hidden: Tensor) -> Head:
        """Return the head on other hidden states, of now."""
        versions = (version_of(hidden), *self.versions[1:])
        return replace(self, hidden=hidden, versions=versions, trained=(None, *self.trained[1:]))


@dataclass(frozen=True, eq=False)
class _Operand:
    value: Tensor
    versions: tuple[tuple[int, int, int] | None, ...] = ()

    def __post_init__(self) -> None:
        _remember(self)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.value,)


class Rows(_Operand):
    """A tensor (*rows, X), X = 1 or V."""


class Columns(_Operand):
    """A tensor (V,), (1,) or () that all rows share."""


Leaf: TypeAlias = Head | Rows | Columns


@dataclass(frozen=True, eq=False, kw_only=True)
class Op:
    """A call of a function of torch on expressions, numbers and the like. cast: what autocast was
    set to."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    cast: Cast


Expression: TypeAlias = Leaf | Op


def below(node: Expression) -> Iterator[Expression]:
    """Return the expressions that a node is made of."""
    if isinstance(node, Op):
        for value in (*node.args, *node.kwargs.values()):
            if isinstance(value, Head | Rows | Columns | Op):
                yield value


def leaves_of(root: Expression) -> list[Leaf]:
    """Return the leaves of an expression, each once."""
    found: dict[int, Expression] = {}
    pending = [root]
    while pending:
        node = pending.pop()
        if id(node) not in found:
            found[id(node)] = node
            pending += below(node)
    return [node for node in found.values() if not isinstance(node, Op)]


def mapped(root: Expression, change: Callable[[Leaf], Leaf]) -> Expression:
    """Return an expression with other leaves; what was shared still is."""
    return _mapped(root, change, {})


# No function that calls itself by a closure: that is a circle, which would hold the tensors.
def _mapped(node: Any, change: Callable[[Leaf], Leaf], known: dict[int, Any]) -> Any:
    if not isinstance(node, Head | Rows | Columns | Op):
        return node
    if id(node) not in known:
        if isinstance(node, Op):
            args = tuple(_mapped(each, change, known) for each in node.args)
            kwargs = {key: _mapped(each, change, known) for key, each in node.kwargs.items()}
            known[id(node)] = replace(node, args=args, kwargs=kwargs)
        else:
            known[id(node)] = change(node)
    return known[id(node)]


def over_rows(root: Expression, change: Callable[[Tensor], Tensor]) -> Expression:
    """Return an expression whose rows were selected or laid out anew, by a function that leaves the
    last dimension of a tensor alone."""

    def changed(leaf: Leaf) -> Leaf:
        match leaf:
            case Head():
                return leaf.on(change(leaf.hidden))
            case Rows():
                return Rows(change(leaf.value))
            case Columns():
                return leaf

    return mapped(root, changed)


def detached(root: Expression) -> Expression:
    """Return an expression of which no gradient goes on."""

    def alone(leaf: Leaf) -> Leaf:
        match leaf:
            case Head():
                hidden, weight, bias = map(_detached, leaf.tensors)
                assert hidden is not None and weight is not None
                return replace(leaf, hidden=hidden, weight=weight, bias=bias)
            case Rows():
                return Rows(leaf.value.detach())
            case Columns():
                return Columns(leaf.value.detach())

    return mapped(root, alone)


def _detached(t: Tensor | None) -> Tensor | None:
    """Return a tensor without gradient; itself if it has none: heads are alike by their weight."""
    return t if t is None or not t.requires_grad else t.detach()


def hollow(leaf: Leaf) -> Leaf:
    """Return a leaf that says what is done with its tensors, and has none."""
    none = torch.empty(0)
    match leaf:
        case Head():
            return replace(leaf, hidden=none, weight=none, bias=None, before=[], trained=())
        case Rows():
            return Rows(none)
        case Columns():
            return Columns(none)


def check_unchanged(root: Expression) -> None:
    """Raise SurgeryError if what an expression is made of was changed in place since."""
    for leaf in leaves_of(root):
        names = ("hidden states", "head's weight", "head's bias")
        if not isinstance(leaf, Head):
            names = ("tensor that was combined with them",)
        for name, t in zip(names, leaf.tensors, strict=True):
            if t is not None and is_given_back(t):
                raise SurgeryError(
                    f"chunked_loss had not computed these logits yet when FSDP2 gave their {name} "
                    f"of shape {tuple(t.shape)} back at the end of forward. Let it stay until "
                    "backward, which needs it as well: "
                    "model.set_reshard_after_forward(False, recurse=False) on the model, or on "
                    "the head if fully_shard was called on that."
                )
        for name, t, version in zip(names, _watched(leaf), leaf.versions, strict=True):
            if t is not None and version_of(t) != version:
                raise SurgeryError(
                    f"chunked_loss had not computed these logits yet when their {name} of shape "
                    f"{tuple(t.shape)} was changed in place, for example by optimizer.step(). "
                    "Compute what you need of them before that: "
                    "old = logits.log_softmax(-1).gather(-1, labels[..., None]).detach(), or run "
                    "the model for them under torch.no_grad()."
                )


def _remember(leaf: Head | _Operand) -> None:
    if leaf.versions:
        return
    if isinstance(leaf, Head):
        trained = tuple(t if isinstance(t, Parameter) else None for t in leaf.tensors)
        object.__setattr__(leaf, "trained", trained)
    versions = tuple(None if t is None else version_of(t) for t in leaf.tensors)
    object.__setattr__(leaf, "versions", versions)


def _watched(leaf: Leaf) -> tuple[Tensor | None, ...]:
    if not isinstance(leaf, Head):
        return leaf.tensors
    pairs = zip(leaf.trained, leaf.tensors, strict=True)
    return tuple(t if own is None else own for own, t in pairs)


def value_of(root: Expression, known: Mapping[int, Tensor]) -> Any:
    """Return what an expression comes to. known: of leaves, by id; tensors (rows, X) and (X,)."""
    return _value(root, dict(known))


def _value(node: Any, known: dict[int, Any]) -> Any:
    if not isinstance(node, Head | Rows | Columns | Op):
        return node
    if id(node) not in known:
        assert isinstance(node, Op)
        args = [_value(each, known) for each in node.args]
        kwargs = {key: _value(each, known) for key, each in node.kwargs.items()}
        with node.cast.again():
            known[id(node)] = node.function(*args, **kwargs)
    return known[id(node)]


def logits(head: Head, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a head's logits, of tensors that have its dtype."""
    with Cast(hidden.device.type, None).again():
        return functional.linear(hidden, weight, bias)


def cast_to(head: Head, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return tensors of a head in the dtype that it computes in."""
    return [t if t is None or head.dtype is None else t.to(head.dtype) for t in tensors]


def whole_leaf(leaf: Leaf) -> Tensor:
    """Return a leaf for all rows at once, in their shape."""
    if not isinstance(leaf, Head):
        return leaf.value
    hidden, weight, bias = cast_to(leaf, leaf.tensors)
    assert hidden is not None and weight is not None
    return logits(leaf, hidden, weight, bias)
