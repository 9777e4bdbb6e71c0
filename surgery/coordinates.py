"""What the optimizer sees: coordinates, each a parameter with a linear map into a weight.

A coordinate of the sampling passes is a weight itself, or a *block*: a parameter that views a part
of the weight's own storage, so that the optimizer writes straight into the weight. Others are
*mapped*: small parameters of their own, each step of which is carried into the weight.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from surgery import sharding

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


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """One trainable tensor and its map into one weight.

    weight: qualified name of the weight. parameter: what the optimizer steps. expand: maps a tensor
    of the parameter's shape to the change of the whole weight that it stands for. active: whether
    it is being trained now.
    """

    weight: str
    parameter: nn.Parameter
    expand: Callable[[Tensor], Tensor]
    active: bool


@dataclass(eq=False, kw_only=True)
class Piece:
    """A coordinate and what is known of it at run time. A mapped one starts from zero.

    index: of a block; None for a whole weight and for a mapped coordinate. twin: what a forward
    reads where FSDP2 has left only a part of the parameter on this rank. map: of a mapped one.
    covers: parameters of the weight that a mapped one stands for. note: what the nodes of the pass
    find here.
    """

    weight: str
    index: Index | None
    parameter: nn.Parameter
    twin: nn.Parameter | None = field(default=None, repr=False)  # freed between forwards
    map: Map | None = None
    covers: int = 0
    prox: float = 0.0  # decay of a mapped coordinate in each step, times its learning rate
    weight_decay: float = 0.0  # of the weight that it stands for
    since: int = 0  # the optimizer step at which a mapped one last started from zero
    note: Any = None
    active: bool = False
    reached: bool = False  # whether a node of its pass has run on its weight
    watched: bool = False  # whether a pass wants the norm of its gradient
    norm: Tensor | None = None  # of the gradient as it stood after the last backward, in float32
    version: int = -1  # of the gradient when `norm` was taken: clipping and unscaling raise it

    @property
    def name(self) -> str:
        mapped = "" if self.map is None else " (mapped)"
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
        return self.covers or self.numel


def _subscript(index: Index) -> str:
    parts = [str(i) if isinstance(i, int) else f"{i.start or 0}:{i.stop or ''}" for i in index]
    return f"[{', '.join(parts)}]"


def piece_of(name: str, weight: nn.Parameter, index: Index | None) -> Piece:
    """Make the coordinate `weight[index]`; a block shares the weight's storage."""
    if index is None:
        return Piece(weight=name, index=None, parameter=weight)
    return Piece(weight=name, index=index, parameter=nn.Parameter(weight.detach()[index]))


@dataclass(eq=False, kw_only=True)
class Site:
    """Where a graph reads a weight: what `nodes.gate` looks up by the identity of the tensor."""

    name: str
    owner: nn.Module
    pieces: tuple[Piece, ...]
    reached: bool = False  # whether a captured graph has read this weight through a gate
    weight: Callable[[], Tensor | None] = field(default=lambda: None)  # weak reference
    twin: Callable[[], Tensor | None] = field(default=lambda: None)  # what a forward reads instead

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"weight": None, "twin": None, "reached": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"weight": lambda: None, "twin": lambda: None}

    def __post_init__(self) -> None:
        self.key = self.name.rpartition(".")[2]
        first = self.pieces[0]
        self.map = first.map
        self.whole = first.index is None and self.map is None

    def current(self) -> nn.Parameter:
        """Return the parameter that the model holds under this name now."""
        return self.owner.get_parameter(self.key)

    def in_place(self) -> bool:
        """Whether the weight is the object that was bound, and the blocks still view its storage.

        `model.to(...)` moves a weight and its blocks apart; `load_state_dict(assign=True)` replaces
        the object.
        """
        weight = self.owner._parameters.get(self.key)
        if weight is None:
            raise sharding.flattened(self.name)
        if self.weight() is not weight and self.twin() is not weight:
            return False
        if sharding.is_cut(weight) and self.twin() is None:
            return False
        if self.map is not None:
            own = self.pieces[0].parameter
            moved = own.dtype != wide(weight) or own.device != weight.device
            return sharding.is_cut(own) or not moved
        return self.whole or all(_views(piece, weight) for piece in self.pieces)

    def bind(self, twins: sharding.Twins) -> None:
        """Register the weight for `nodes.gate` and let the blocks view it (again)."""
        weight, twin = twins.get((id(self.owner), self.key), (self.current(), None))
        self.weight = weakref.ref(weight)
        SITES[weight] = weakref.ref(self)
        if twin is not None:
            self.twin = weakref.ref(twin)
            SITES[twin] = weakref.ref(self)
        for piece in self.pieces:
            if piece.index is not None:
                piece.parameter.data = weight.detach()[piece.index]
            elif piece.map is None:
                piece.parameter, piece.twin = weight, twin
            elif not sharding.is_cut(piece.parameter):
                piece.parameter.data = piece.parameter.detach().to(weight.device, wide(weight))

    def release(self) -> None:
        """Let `nodes.gate` forget the weight."""
        for weight in (self.weight(), self.twin()):
            if weight is not None:
                SITES.pop(weight, None)


# weight -> weak reference to its Site, for all models. Weak on both sides: a Site leads back to the
# model, which holds the weight.
SITES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def site_of(weight: Tensor) -> Site | None:
    """Return the site of the tensor object `weight`, if it has one."""
    reference = SITES.get(weight)
    return None if reference is None else reference()


def wide(weight: Tensor) -> torch.dtype:
    """Return the dtype that steps of a weight are computed in: at least float32."""
    return torch.promote_types(weight.dtype, torch.float32)


def matrix_of(weight: Tensor) -> Tensor:
    """Return a weight as a matrix, sharing its storage: those of experts under one another."""
    return weight.detach().view(-1, weight.shape[-1] if weight.ndim else 1)


def matrix_shape(weight: Tensor) -> tuple[int, int]:
    """Return the shape of `matrix_of`, of all of a weight that is cut too."""
    width = weight.shape[-1] if weight.ndim else 1
    return (weight.numel() // width if width else 0), width


def _views(piece: Piece, weight: nn.Parameter | None) -> bool:
    if weight is None:
        return False
    block, part = piece.parameter, weight.detach()[piece.index]
    return block.data_ptr() == part.data_ptr() and block.dtype == part.dtype


def unique(pieces: Iterable[Piece]) -> list[Piece]:
    """Return the first piece of each parameter: several weights may share one coordinate."""
    first: dict[int, Piece] = {}
    for piece in pieces:
        first.setdefault(id(piece.parameter), piece)
    return list(first.values())


class CoordinateTable(nn.Module):
    """Lists blocks and mapped coordinates in `model.parameters()`, where optimizers find them.

    Checkpoints do not see it: what they stand for is in weights that are saved anyway.
    """

    def __init__(self, pieces: Iterable[Piece]) -> None:
        super().__init__()
        self._parameters.update({piece.key: piece.parameter for piece in unique(pieces)})

    def forward(self, x: Any) -> Any:
        """Return x: an nn.Sequential calls all of its children."""
        return x

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save nothing."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Expect nothing."""


def describe(sites: Iterable[Site]) -> list[Coordinates]:
    """Return the public view of the coordinates, in the order of the model's weights."""
    return [
        Coordinates(
            weight=piece.weight,
            parameter=piece.parameter,
            expand=partial(_expand, piece, site.current().shape),
            active=piece.active,
        )
        for site in sites
        for piece in site.pieces
    ]


def _expand(piece: Piece, shape: torch.Size, delta: Tensor) -> Tensor:
    if piece.map is not None:
        change = piece.map.expand(delta)
        return change.t() if piece.map.transposed else change.view(shape)
    if piece.index is None:
        return delta
    change = delta.new_zeros(shape)
    change[piece.index] = delta
    return change
