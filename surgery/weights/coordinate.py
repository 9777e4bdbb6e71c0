"""What the optimizer sees: coordinates, each a parameter with a linear map into a weight.

A coordinate of the sampling passes is a weight itself, or a *block*: a parameter that views a part
of the weight's own storage, so that the optimizer writes straight into the weight. Others are
*mapped*: small parameters of their own, each step of which is carried into the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn

from surgery.compat.modules import Unsaved

Index: TypeAlias = tuple[int | slice, ...]

TABLE = "surgery_coordinates"  # name of the child module that lists blocks in model.parameters()


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


@dataclass(frozen=True, kw_only=True)
class Block:
    """The parameter views weight[index]."""

    index: Index


@dataclass(eq=False, kw_only=True)
class Mapped:
    """The parameter is a small one of its own, from zero; its steps are carried by a map.

    covers: parameters of the weight. prox: decay of the parameter in each step, times its learning
    rate. weight_decay: of the weight, likewise. since: the optimizer step at which the parameter
    last started from zero.
    """

    map: Map
    covers: int
    prox: float = 0.0
    weight_decay: float = 0.0
    since: int = 0


Rule: TypeAlias = Whole | Block | Mapped


@dataclass(eq=False, kw_only=True)
class Coordinate:
    """A parameter that stands for a weight or a part of it, and what is known of it at run time.

    weight: qualified name of the weight. rule: how the parameter stands for it. beside: what the
    nodes of its pass find. twin: what a forward reads where FSDP2 has left only a part of the
    parameter on this rank.
    """

    weight: str
    parameter: nn.Parameter
    rule: Rule
    beside: Beside | None = None
    twin: nn.Parameter | None = field(default=None, repr=False)  # freed between forwards
    active: bool = False
    reached: bool = False  # whether a node of its pass has run on its weight
    unused: bool = False  # whether the output of no forward so far has depended on its weight
    watched: bool = False  # whether a pass wants the norm of its gradient
    norm: Tensor | None = None  # of the gradient as it stood after the last backward, in float32
    version: int = -1  # of the gradient when `norm` was taken: clipping and unscaling raise it

    @property
    def mapped(self) -> Mapped | None:
        return self.rule if isinstance(self.rule, Mapped) else None

    @property
    def index(self) -> Index | None:
        """Of a block; None for a whole weight and for a mapped coordinate."""
        return self.rule.index if isinstance(self.rule, Block) else None

    @property
    def name(self) -> str:
        mapped = " (mapped)" if self.mapped else ""
        return self.weight + (_subscript(self.index) if self.index is not None else mapped)

    @property
    def key(self) -> str:
        """Its name in the table: torch's checkpoints take dots for levels of modules."""
        return self.name.replace(".", "/")

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


def _subscript(index: Index) -> str:
    parts = [str(i) if isinstance(i, int) else f"{i.start or 0}:{i.stop or ''}" for i in index]
    return f"[{', '.join(parts)}]"


def coordinate_of(model: nn.Module, name: str, index: Index | None = None) -> Coordinate:
    """Return the coordinate that is a weight of a model, or weight[index], sharing its storage."""
    weight = model.get_parameter(name)
    if index is None:
        return Coordinate(weight=name, parameter=weight, rule=Whole())
    part = nn.Parameter(weight.detach()[index])
    return Coordinate(weight=name, parameter=part, rule=Block(index=index))


def unique(coordinates: Iterable[Coordinate]) -> list[Coordinate]:
    """Return the first coordinate of each parameter: several weights may share one."""
    first: dict[int, Coordinate] = {}
    for each in coordinates:
        first.setdefault(id(each.parameter), each)
    return list(first.values())


class CoordinateTable(Unsaved):
    """Lists blocks and mapped coordinates in `model.parameters()`, where optimizers find them.

    Checkpoints do not see it: what they stand for is in weights that are saved anyway.
    """

    def __init__(self, coordinates: Iterable[Coordinate]) -> None:
        super().__init__()
        for each in unique(coordinates):
            self.register_parameter(each.key, each.parameter)

    def forward(self, x: Any) -> Any:
        """Return x: an nn.Sequential calls all of its children."""
        return x


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """One trainable tensor and its map into one weight: what `surgery.coordinates` returns.

    weight: qualified name of the weight. parameter: what the optimizer steps. expand: maps a tensor
    of the parameter's shape to the change of the whole weight that it stands for. active: whether
    it is being trained now.
    """

    weight: str
    parameter: nn.Parameter
    expand: Callable[[Tensor], Tensor]
    active: bool
