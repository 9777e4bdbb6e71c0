"""What the optimizer sees: coordinates, each a parameter with a linear map into a weight.

A coordinate of the sampling passes is a weight itself, or a *block*: a parameter that views a part
of the weight's own storage, so that the optimizer writes straight into the weight.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

Index: TypeAlias = tuple[int | slice, ...]

TABLE = "surgery_coordinates"  # name of the child module that lists blocks in model.parameters()


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
    """A coordinate and what is known of it at run time; `index` is None for a whole weight."""

    weight: str
    index: Index | None
    parameter: nn.Parameter
    active: bool = False
    watched: bool = False  # whether a pass wants the norm of its gradient
    norm: Tensor | None = None  # of the gradient as it stood after the last backward, in float32
    version: int = -1  # of the gradient when `norm` was taken: clipping and unscaling raise it

    @property
    def name(self) -> str:
        return self.weight if self.index is None else self.weight + _subscript(self.index)

    @property
    def numel(self) -> int:
        return self.parameter.numel()


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

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"weight": None, "reached": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"weight": lambda: None}

    def __post_init__(self) -> None:
        self.key = self.name.rpartition(".")[2]
        self.whole = self.pieces[0].index is None

    def current(self) -> nn.Parameter:
        """Return the parameter that the model holds under this name now."""
        return self.owner.get_parameter(self.key)

    def in_place(self) -> bool:
        """Whether the weight is the object that was bound, and the blocks still view its storage.

        `model.to(...)` moves a weight and its blocks apart; `load_state_dict(assign=True)` replaces
        the object.
        """
        weight = self.owner._parameters[self.key]
        if self.weight() is not weight:
            return False
        return self.whole or all(_views(piece, weight) for piece in self.pieces)

    def bind(self) -> None:
        """Register the weight for `nodes.gate` and let the blocks view it (again)."""
        weight = self.current()
        self.weight = weakref.ref(weight)
        SITES[weight] = weakref.ref(self)
        for piece in self.pieces:
            if piece.index is None:
                piece.parameter = weight
            else:
                piece.parameter.data = weight.detach()[piece.index]


# weight -> weak reference to its Site, for all models. Weak on both sides: a Site leads back to the
# model, which holds the weight.
SITES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def site_of(weight: Tensor) -> Site | None:
    """Return the site of the tensor object `weight`, if it has one."""
    reference = SITES.get(weight)
    return None if reference is None else reference()


def _views(piece: Piece, weight: nn.Parameter | None) -> bool:
    if weight is None:
        return False
    block, part = piece.parameter, weight.detach()[piece.index]
    return block.data_ptr() == part.data_ptr() and block.dtype == part.dtype


class CoordinateTable(nn.Module):
    """Lists the blocks in `model.parameters()`, so that any optimizer finds them.

    Checkpoints do not see it: the blocks are parts of weights that are saved anyway.
    """

    def __init__(self, pieces: Iterable[Piece]) -> None:
        super().__init__()
        self._parameters.update({piece.name: piece.parameter for piece in pieces})

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
            expand=partial(_expand, piece.index, site.current().shape),
            active=piece.active,
        )
        for site in sites
        for piece in site.pieces
    ]


def _expand(index: Index | None, shape: torch.Size, delta: Tensor) -> Tensor:
    if index is None:
        return delta
    change = delta.new_zeros(shape)
    change[index] = delta
    return change
