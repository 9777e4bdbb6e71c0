"""The table that lists coordinates in `model.parameters()`, and where those rest that wait."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.compat import modules
from surgery.compat.fsdp import lay, leave_to_us
from surgery.ranks import is_joined
from surgery.weights import shards
from surgery.weights.coordinate import Coordinate, resting, unique

TABLE = "surgery_coordinates"  # name of the child module that lists coordinates
_COPIES = "copies"  # of the child of that for copies, which FSDP2 shall not see
_NORMS = "norms"  # of the children of these for those of LayerNorms

Kind = tuple[torch.device, torch.dtype]
Weights = Mapping[tuple[int, str], nn.Parameter]  # by (id of the module, name)


def floor_sizes(resting: Iterable[Tensor]) -> dict[Kind, int]:
    """Return the numbers that copies which are not trained need to lie on: as the largest has."""
    sizes: dict[Kind, int] = {}
    for each in resting:
        kind = each.device, each.dtype
        sizes[kind] = max(sizes.get(kind, 0), shards.local(each.detach()).numel())
    return sizes


# Of a table, what lets weights be what coordinates are.
BEFORE_SAVED: weakref.WeakKeyDictionary[nn.Module, Callable[[], None]] = weakref.WeakKeyDictionary()


class _Part(modules.Unsaved):
    """A part of the table."""

    def forward(self, x: Any) -> Any:
        """Return x: an nn.Sequential calls all of its children."""
        return x

    def __getattr__(self, name: str) -> Any:
        return modules.look_up(self, name)


@leave_to_us
class _OfCopies(_Part):
    """The copies, which `fully_shard` leaves to us."""


class _OfNorms(_Part, nn.LayerNorm):
    """Coordinates of parameters of LayerNorms; it normalises nothing."""

    def __init__(self) -> None:
        nn.LayerNorm.__init__(self, 0, elementwise_affine=False)


class _CopiesOfNorms(_OfCopies, _OfNorms):
    """Copies of parameters of LayerNorms."""


class CoordinateTable(_Part):
    """Lists copies and mapped coordinates under dotted names that contain the weight's own.

    Checkpoints do not see it: what they stand for is in weights that are saved anyway. Coordinates
    of the parameters of LayerNorms stand in a child that is one: transformers tells by the kind of
    module what is not to be decayed. Copies stand in a child too, if others are there. All that are
    not trained lie on one piece of memory, `floor`, of the size of the largest: whoever writes all
    parameters may write into it.
    """

    def __init__(self, coordinates: Iterable[Coordinate]) -> None:
        super().__init__()
        self.floor: dict[Kind, Tensor] = {}
        self.resting: dict[int, nn.Parameter] = {}
        self.listed: list[tuple[Coordinate, nn.Module]] = []  # copies, and what holds each
        for each in unique(coordinates):
            apart = each.copied and not isinstance(self, TableOfCopies)
            part = _child(self, _COPIES, _OfCopies) if apart else self
            if isinstance(each.owner, nn.LayerNorm):
                part = _child(part, _NORMS, _CopiesOfNorms if each.copied else _OfNorms)
            if each.copied:
                modules.hold_current(part, self.follow)
                self.listed.append((each, part))
            modules.hold(part, each.key, each.parameter)

    def before_saved(self) -> None:
        """Let weights, which are listed before, become what was made of coordinates by hand."""
        BEFORE_SAVED.get(self, lambda: None)()

    def follow(self, weights: Weights | None = None) -> None:
        """Cut copies whose weights `fully_shard` has cut, as these; they begin anew.

        weights: the parameters of modules that it has cut, where a forward shows others.
        """
        if not is_joined():  # else this would look at each copy whenever parameters are listed
            return
        followed = False
        for each, part in self.listed:
            place = id(each.owner), each.held_as
            weight = (weights or {}).get(place, modules.held(each.owner, each.held_as))
            if weight is None or not shards.is_cut(weight) or shards.is_cut(each.parameter):
                continue
            each.parameter = resting(weight, each.parameter.dtype, each.index)
            modules.hold(part, each.key, each.parameter)
            assert each.copied is not None
            each.copied.resting, each.seen, followed = True, (), True
        if followed:
            self.rest(each for each, _ in self.listed)

    def rest(self, coordinates: Iterable[Coordinate]) -> None:
        """Put copies that are not trained on the floor, and make it as large as they need it."""
        self.resting = {
            id(each.parameter): each.parameter
            for each in coordinates
            if each.copied is not None and each.copied.resting
        }
        sizes = floor_sizes(self.resting.values())
        self.floor = {
            kind: torch.zeros(n, device=kind[0], dtype=kind[1]) for kind, n in sizes.items()
        }
        for parameter in self.resting.values():
            self._lay(parameter, self.floor[parameter.device, parameter.dtype])

    def _lay(self, parameter: nn.Parameter, floor: Tensor) -> None:
        own = shards.local(parameter.detach())
        lay(parameter, floor[: own.numel()].view(own.shape))

    def change(self, fn: Callable[[Tensor], Tensor], each: Callable[[], Any]) -> None:
        """Move the floor; one by one, each that rests on it would get memory of its own."""
        moved = {kind: fn(floor) for kind, floor in self.floor.items()}
        held = [(p, p.device, p.dtype) for p in self.resting.values()]
        with modules.without(self, self.resting):
            each()
        for parameter, device, dtype in held:
            self._lay(parameter, moved[device, dtype])
        self.floor = {(t.device, t.dtype): t for t in moved.values()}

    def __deepcopy__(self, memo: dict[int, Any]) -> CoordinateTable:
        floor = {kind: t.clone() for kind, t in self.floor.items()}
        for key, parameter in self.resting.items():
            own = floor[parameter.device, parameter.dtype][: parameter.numel()]
            memo[key] = nn.Parameter(own.view(parameter.shape), parameter.requires_grad)
        return modules.deepcopied(self, memo)


@leave_to_us
class TableOfCopies(CoordinateTable):
    """The table where there are only copies."""


def table_of(coordinates: Sequence[Coordinate]) -> CoordinateTable:
    """Return the table of coordinates that are not weights."""
    kind = TableOfCopies if all(each.copied for each in coordinates) else CoordinateTable
    return kind(coordinates)


def _child(owner: nn.Module, name: str, kind: type[_Part]) -> _Part:
    """Return a child of a module, made if it is not there."""
    if modules.child(owner, name) is None:
        owner.add_module(name, kind())
    child = modules.child(owner, name)
    assert isinstance(child, _Part)
    return child
