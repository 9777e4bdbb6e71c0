"""Which tensors the coordinates of a surgery and their hooks are on: renewed when they change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from surgery.compat import modules
from surgery.compat.fsdp import twins
from surgery.engine.backward import Backward
from surgery.engine.decide import Decision
from surgery.engine.fsdp import check_cut, replicated, take_cut
from surgery.weights.coordinate import TABLE, unique


@dataclass(eq=False, kw_only=True)
class Binding:
    """The binding of one surgery. cut: whether FSDP2 shards the model."""

    decision: Decision
    backward: Backward
    bound: bool = False
    cut: bool = False
    handles: list[Any] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"bound": False, "handles": []}

    def bind(self, forward: bool = False) -> None:
        """Make sites and hooks point at the model's present parameters; cheap when they do.

        forward: whether a forward is under way, in which FSDP2 shows whole weights.
        """
        sites, coordinates = self.decision.sites, self.decision.coordinates
        self.backward.begin()
        for each in coordinates:
            if not each.parameter.requires_grad:  # as get_peft_model leaves all but its own
                each.parameter.requires_grad_(True)
        if self.bound and all(site.in_place() for site in sites):
            return
        self.release()
        model = self.decision.model
        found = twins(model, forward)
        check_cut(sites, found)
        if found:
            take_cut(unique(coordinates), coordinates, modules.child(model, TABLE), found)
        for site in sites:
            site.bind(found)
        once = unique(coordinates)
        self.cut = bool(found)
        self.backward.begin(replicated(once) if found else ())
        self.handles += [self.backward.watch(each) for each in once]
        self.bound = True

    def release(self) -> None:
        """Take the hooks off and forget the sites."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for site in self.decision.sites:
            site.release()
        self.bound = False
