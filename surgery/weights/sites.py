"""Sites: where graphs read a weight, found by the identity of the tensor that is read."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from surgery.compat import modules
from surgery.compat.fsdp import Twins
from surgery.compat.tensors import is_fake
from surgery.errors import ModelError
from surgery.weights import shards
from surgery.weights.coordinate import (
    Beside,
    Coordinate,
    Coordinates,
    Copied,
    Mapped,
    Whole,
)
from surgery.weights.indices import write_block
from surgery.weights.matrices import wide

B = TypeVar("B", bound=Beside)


@dataclass(eq=False, kw_only=True)
class Site:
    """One weight, and what is known of it where a graph reads it."""

    name: str
    owner: nn.Module
    coordinates: tuple[Coordinate, ...]
    reached: bool = False  # whether a captured graph has read this weight through a gate
    weight: Callable[[], Tensor | None] = field(default=lambda: None)  # weak reference
    twin: Callable[[], Tensor | None] = field(default=lambda: None)  # what a forward reads instead

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"weight": None, "twin": None, "reached": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"weight": lambda: None, "twin": lambda: None}

    def __post_init__(self) -> None:
        self.key = self.name.rpartition(".")[2]
        rule = self.coordinates[0].rule
        self.mapped = isinstance(rule, Mapped)
        self.whole = isinstance(rule, Whole)
        self.copied = isinstance(rule, Copied)

    def current(self) -> nn.Parameter:
        """Return the parameter that the model holds under this name now; ModelError if none."""
        weight = modules.held(self.owner, self.key)
        if weight is None:
            if modules.is_computed(self.owner, self.key):
                raise ModelError(
                    f"{self.name} is computed from other parameters since surgery.apply, because "
                    "pruning, weight_norm, spectral_norm or a parametrization was put on its "
                    "module. Do that first: surgery.remove(model), put it on, "
                    "surgery.apply(model, ...), and build another optimizer."
                )
            raise shards.flattened(self.name)
        return weight

    def shown(self) -> nn.Parameter:
        """Return the parameter that a forward reads now: under FSDP2, a whole one."""
        twin = self.twin()
        return twin if isinstance(twin, nn.Parameter) else self.current()

    @property
    def unused(self) -> bool:
        """Whether the output of no forward so far has depended on the weight."""
        return self.coordinates[0].unused

    def note(self, reached: bool) -> None:
        """Note that a graph has read the weight, or that the output did not depend on it."""
        if reached != self.reached or not reached:
            self.reached = reached
            for each in self.coordinates:
                each.unused = not reached

    def was_read(self, weight: Tensor) -> None:
        """Note that a graph has read the weight, this tensor; see `read`."""
        if not self.reached and not is_fake(weight):
            self.note(reached=True)

    def beside(self, kind: type[B]) -> B | None:
        """Return what stands beside the weight, if it is of this kind."""
        found = self.coordinates[0].beside
        return found if isinstance(found, kind) else None

    def in_place(self) -> bool:
        """Whether the weight is the object that was bound, and the coordinates lie where it does.

        `model.to(...)` changes dtypes and devices; `load_state_dict(assign=True)` replaces the
        object.
        """
        weight = self.current()
        if self.weight() is not weight and self.twin() is not weight:
            return False
        if shards.is_cut(weight) and self.twin() is None:
            return False
        if self.whole:
            return True
        return all(fits(each, weight) for each in self.coordinates)

    def bind(self, twins: Twins) -> None:
        """Register the weight for the nodes of graphs."""
        weight, twin = twins.get((id(self.owner), self.key), (self.current(), None))
        self.weight = weakref.ref(weight)
        SITES[weight] = weakref.ref(self)
        if twin is not None:
            self.twin = weakref.ref(twin)
            SITES[twin] = weakref.ref(self)
        for each in self.coordinates:
            match each.rule:
                case Whole():
                    each.parameter, each.twin = weight, twin
                case Mapped() if not shards.is_cut(each.parameter):
                    own = each.parameter.detach()
                    each.parameter.data = own.to(weight.device, wide(weight))
                case Copied():
                    each.twin = twin
                case _:
                    pass

    def release(self) -> None:
        """Let the nodes of graphs forget the weight."""
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


def read(weight: Tensor) -> Site | None:
    """Return the site of a weight that a graph reads now, and note that it was reached.

    A dry run on tensors without memory reaches nothing.
    """
    site = site_of(weight)
    if site is not None:
        site.was_read(weight)
    return site


def trained_by(weight: Tensor, kind: type[B]) -> tuple[Coordinate, B] | None:
    """Return the coordinate of a weight that a graph reads now, and what of a kind stands beside
    it, if there are both and it is being trained."""
    site = read(weight)
    if site is None:
        return None
    coordinate, beside = site.coordinates[0], site.beside(kind)
    coordinate.reached = coordinate.reached or not is_fake(weight)
    return (coordinate, beside) if beside and coordinate.active else None


def stand_in(fake: Tensor, weight: Tensor) -> None:
    """Let a tensor of a dry run be found as the weight that it stands for."""
    if weight in SITES:
        SITES[fake] = SITES[weight]


def fits(coordinate: Coordinate, weight: Tensor) -> bool:
    """Whether a coordinate has a device and a dtype that go with the weight's."""
    own = coordinate.parameter
    if shards.is_cut(own):
        return True
    dtypes = (weight.dtype, wide(weight)) if coordinate.copied else (wide(weight),)
    return own.device == weight.device and own.dtype in dtypes


def describe(sites: Iterable[Site]) -> list[Coordinates]:
    """Return the public view of the coordinates, in the order of the model's weights."""
    return [
        Coordinates(
            weight=each.weight,
            parameter=each.parameter,
            expand=partial(_expand, each, site.current().shape),
            active=each.active,
        )
        for site in sites
        for each in site.coordinates
    ]


def _expand(coordinate: Coordinate, shape: torch.Size, delta: Tensor) -> Tensor:
    match coordinate.rule:
        case Mapped(map=map):
            change = map.expand(delta)
            return change.t() if map.transposed else change.view(shape)
        case Copied(index=index) if index is not None:
            change = delta.new_zeros(shape)
            write_block(change, index, delta)
            return change
        case _:
            return delta
