"""The table that lists coordinates in `model.parameters()`, and where those rest that wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from surgery.compat import modules
from surgery.weights.coordinate import Coordinate, unique

TABLE = "surgery_coordinates"  # name of the child module that lists coordinates
_NORMS = "norms"  # of the child of that for those of LayerNorms

Kind = tuple[torch.device, torch.dtype]


def floor_sizes(resting: Iterable[Tensor]) -> dict[Kind, int]:
    """Return the numbers that copies which are not trained need to lie on: as the largest has."""
    sizes: dict[Kind, int] = {}
    for each in resting:
        kind = each.device, each.dtype
        sizes[kind] = max(sizes.get(kind, 0), each.numel())
    return sizes


class CoordinateTable(modules.Unsaved):
    """Lists copies and mapped coordinates under dotted names that contain the weight's own.

    Checkpoints do not see it: what they stand for is in weights that are saved anyway. Coordinates
    of the parameters of LayerNorms stand in a child that is one: transformers tells by the kind of
    module what is not to be decayed. All copies that are not trained lie on one piece of memory,
    `floor`, of the size of the largest: whoever writes all parameters may write into it.
    """

    def __init__(self, coordinates: Iterable[Coordinate]) -> None:
        super().__init__()
        self.floor: dict[Kind, Tensor] = {}
        self.resting: dict[int, nn.Parameter] = {}
        norms = _OfNorms()
        for each in unique(coordinates):
            table = norms if isinstance(each.owner, nn.LayerNorm) else self
            modules.hold(table, each.key, each.parameter)
        if next(norms.parameters(), None) is not None:
            self.add_module(_NORMS, norms)

    def forward(self, x: Any) -> Any:
        """Return x: an nn.Sequential calls all of its children."""
        return x

    def __getattr__(self, name: str) -> Any:
        return modules.look_up(self, name)

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
        parameter.data = floor[: parameter.numel()].view(parameter.shape)

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


class _OfNorms(modules.Unsaved, nn.LayerNorm):
    """The coordinates of parameters of LayerNorms; it normalises nothing."""

    def __init__(self) -> None:
        nn.LayerNorm.__init__(self, 0, elementwise_affine=False)

    def __getattr__(self, name: str) -> Any:
        return modules.look_up(self, name)
