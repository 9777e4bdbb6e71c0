"""What the optimizer sees: coordinates, each a parameter with a linear map into a weight.

A coordinate of the sampling passes is a weight itself, or a *copy* of a weight or a block of it,
which has memory of its own as long as it is trained: of blocks, since optimizers write raw memory
that must not be another's, and of 16-bit weights, in float32, since steps into those would be lost.
Others are *mapped*: small parameters of their own. Each step of a copy is rounded into the weight,
each step of a mapped coordinate carried into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from surgery.weights import shards
from surgery.weights.indices import Block, Index, Rows, block_of, subscript
from surgery.weights.matrices import wide

Precision: TypeAlias = Literal["auto", "weights"]  # of copies: at least float32, or as weights are


class Map(Protocol):
    """A linear map from a mapped coordinate to changes of a weight, as a matrix (out, in).

    transposed: whether the weight is stored as (in, out), as in GPT-2.
    """

    transposed: bool

    def expand(self, delta: Tensor) -> Tensor:
        """Return the whole change (out, in) that a change of the coordinate stands for."""
        ...

    def change(self, delta: Tensor, part: slice) -> Tensor:
        """Return these rows of `expand(delta)`."""
        ...

    def add_into(self, matrix: Tensor, delta: Tensor) -> None:
        """Add `expand(delta)` to the weight's matrix (out, in), of the same dtype, in place."""
        ...

    def adjoint(self, gradient: Tensor) -> Tensor | None:
        """Return the gradient of the coordinate, given that of the weight's matrix (out, in); None
        if that cannot be said."""
        ...

    def pure(self) -> tuple[Any, ...] | None:
        """Return a function and its further arguments: (matrix, delta, *more) -> `expand(delta)` as
        a matrix, of tensors and numbers only, so that an accelerator can take it in one launch.
        None if there is none.
        """
        ...


class Beside:
    """What stands beside a weight for the nodes of a pass: a projection of x, a direction of W.

    A node finds it by the identity of the weight that it is given; see `Site.beside`.
    """


# -- rules: how a parameter stands for a weight ----------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Whole:
    """The parameter is the weight."""


@dataclass(eq=False, kw_only=True)
class Copied:
    """The parameter is a copy of weight[index], of all of it for None, and rounded into it.

    resting: it is not trained, and lies on memory that is no one's. since: the optimizer step at
    which it was copied.
    """

    index: Block | None
    resting: bool = True
    since: int = 0


@dataclass(eq=False, kw_only=True)
class Mapped:
    """The parameter is a small one of its own, from zero; its steps are carried by a map.

    covers: parameters of the weight. prox: decay of the parameter in each step, times its learning
    rate. weight_decay: of the weight, likewise. since: the optimizer step at which the parameter
    last started from zero. carried: what of it the weight holds; None: nothing yet.
    """

    map: Map
    covers: int
    prox: float = 0.0
    weight_decay: float = 0.0
    since: int = 0
    carried: Tensor | None = None


Rule: TypeAlias = Whole | Copied | Mapped


@dataclass(eq=False, kw_only=True)
class Coordinate:
    """A parameter that stands for a weight or a part of it, and its state at run time.

    weight: the qualified name of the weight. parameter: what the optimizer steps. rule: how the
    parameter stands for the weight. owner: the module that holds the weight. beside: what the nodes
    of the pass find by the weight, such as a projection. twin: what a forward reads if FSDP2 has
    left only a part of the parameter on this rank.
    """

    weight: str
    parameter: nn.Parameter
    rule: Rule
    owner: nn.Module = field(repr=False)
    beside: Beside | None = None
    twin: nn.Parameter | None = field(default=None, repr=False)  # freed between forwards
    drawn: bool = False  # to be trained now
    frozen: bool = False  # by the user, with requires_grad of its weight
    reached: bool = False  # whether a node of its pass has run on its weight
    unused: bool = False  # whether the output of no forward so far has depended on its weight
    watched: bool = False  # whether a pass wants the norm of its gradient
    norm: Tensor | None = None  # of the gradient as it stood after the last backward, in float32
    version: int = -1  # of the gradient when `norm` was taken: clipping and unscaling raise it
    seen: tuple[int, ...] = ()  # versions of parameter and weight when they last agreed

    @property
    def active(self) -> bool:
        """Whether it is being trained now."""
        return self.drawn and not self.frozen

    @active.setter
    def active(self, drawn: bool) -> None:
        self.drawn = drawn

    @property
    def mapped(self) -> Mapped | None:
        return self.rule if isinstance(self.rule, Mapped) else None

    @property
    def copied(self) -> Copied | None:
        return self.rule if isinstance(self.rule, Copied) else None

    @property
    def index(self) -> Block | None:
        """Of a block; None for a whole weight and for a mapped coordinate."""
        return self.rule.index if isinstance(self.rule, Copied) else None

    @property
    def name(self) -> str:
        mapped = " (mapped)" if self.mapped else ""
        return self.weight + (subscript(self.index) if self.index is not None else mapped)

    @property
    def key(self) -> str:
        """Its name in the table, which patterns for names of weights match."""
        return self.weight + (subscript(self.index) if self.index is not None else "")

    @property
    def held_as(self) -> str:
        """The name under which its owner holds the weight."""
        return self.weight.rpartition(".")[2]

    def part(self, weight: Tensor) -> Tensor:
        """Return the block of its weight that it is of, a view unless it is of rows; the weight
        itself if it is of all."""
        return block_of(weight.detach(), self.index)

    @property
    def read(self) -> nn.Parameter:
        """What a forward reads and autograd gives a gradient to."""
        return self.parameter if self.twin is None else self.twin

    @property
    def numel(self) -> int:
        return self.parameter.numel()

    @property
    def size(self) -> int:
        """Parameters of the model that it stands for."""
        return self.mapped.covers if self.mapped else self.numel


def coordinate_of(
    model: nn.Module, name: str, index: Index | None = None, precision: Precision = "auto"
) -> Coordinate:
    """Return a coordinate for a weight of a model, or for weight[index].

    The coordinate is the weight itself, or a copy: a block is copied, and so is a weight of less
    than 32 bits, unless precision is "weights".
    """
    owner = model.get_submodule(name.rpartition(".")[0])
    weight = model.get_parameter(name)
    dtype = wide(weight) if precision == "auto" else weight.dtype
    if index is None and dtype == weight.dtype:
        return Coordinate(weight=name, parameter=weight, rule=Whole(), owner=owner)
    rule = Copied(index=index)
    return Coordinate(weight=name, parameter=resting(weight, dtype, index), rule=rule, owner=owner)


def densely(
    model: nn.Module, names: Iterable[str], precision: Precision = "auto"
) -> list[Coordinate]:
    """Return coordinates for weights that are trained whole in every step; see `coordinate_of`."""
    found = [coordinate_of(model, name, precision=precision) for name in names]
    for each in found:
        each.active = True
    return found


def resting(weight: Tensor, dtype: torch.dtype, index: Block | None = None) -> nn.Parameter:
    """Return a parameter for weight[index] without memory; cut as the weight is."""
    own = shards.local(weight.detach())
    if isinstance(index, Rows):
        shape = torch.Size([len(index.numbers), *own.shape[1:]])
    else:
        shape = block_of(own, index).shape
    # Of meta weights too: what a parameter is of cannot change.
    held = torch.zeros((), dtype=dtype, device=None if weight.is_meta else own.device)
    held = held.expand(shape)
    return nn.Parameter(held if index is not None else shards.cut_as(held, weight))


def unique(coordinates: Iterable[Coordinate]) -> list[Coordinate]:
    """Return the first coordinate of each parameter: several weights may share one."""
    first: dict[int, Coordinate] = {}
    for each in coordinates:
        first.setdefault(id(each.parameter), each)
    return list(first.values())


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """One trainable tensor and its map into one weight: what `surgery.coordinates` returns.

    weight: the qualified name of the weight. parameter: what the optimizer steps. expand: maps a
    change of the parameter to the change of the whole weight that it stands for. active: whether
    the coordinate is being trained now.
    """

    weight: str
    parameter: nn.Parameter
    expand: Callable[[Tensor], Tensor]
    active: bool

    def __repr__(self) -> str:
        name, shape = type(self).__name__, tuple(self.parameter.shape)
        return f"{name}(weight={self.weight!r}, shape={shape}, active={self.active})"
