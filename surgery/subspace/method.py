"""What passes share whose optimizer sees a projection of each weight."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from surgery.contract.method import Method, Run
from surgery.errors import CaptureError, TargetError, listed
from surgery.graph.saved import Saved
from surgery.subspace import lowering  # noqa: F401 # says how compilers take the nodes
from surgery.subspace.nodes import Projection, projection_of
from surgery.subspace.reducing import OneSided
from surgery.subspace.rewrite import Rewritten, project_linears
from surgery.weights.coordinate import Coordinate, Mapped
from surgery.weights.linears import inputs_of, linears
from surgery.weights.matrices import wide
from surgery.weights.targets import Targets, select


def choose(
    model: nn.Module,
    targets: Targets,
    always: str | Sequence[str],
    what: str,
    option: str,
    size: int,
    stacked: bool = False,
    width: Callable[[nn.Module, str], int] = inputs_of,
    channels: str = "inputs",
) -> tuple[list[str], list[str]]:
    """Return the weights to project, and those to train densely, in the model's order.

    Linears among the default targets with no more than `size` inputs are trained densely. what,
    option: the names of the pass and of its option for the size, for errors. stacked: whether to
    include stacked experts. width: what is compared with the size instead of the inputs; channels:
    its name. Raises TargetError if there is nothing to project.
    """
    dense = set(select(model, always, "always")) if always else set()
    names = [name for name in linears(model, targets, what, stacked) if name not in dense]
    small = [name for name in names if width(model, name) <= size]
    if small and targets is not None:
        raise TargetError(
            f"{what}: {listed(small)} has {width(model, small[0])} {channels}, no more than "
            f"{option}={size}: there is nothing to project. Train it densely with always=[...], or "
            f"use a smaller {option}."
        )
    names = [name for name in names if name not in small]
    if not names:
        raise TargetError(
            f"{what}: no trainable Linear with more than {option}={size} {channels} among the "
            f"targets. Use a smaller {option}, name others with targets=[...], and check that "
            "requires_grad was not switched off before surgery.apply."
        )
    return names, [name for name, _ in model.named_parameters() if name in dense | set(small)]


def mapped(
    model: nn.Module,
    name: str,
    projection: Projection,
    prox: float = 0.0,
    weight_decay: float = 0.0,
) -> Coordinate:
    """Return a coordinate (out, k) of a weight, from zero, whose map is a projection of its x."""
    out = model.get_parameter(name).numel() // inputs_of(model, name)
    return mapped_as(model, name, projection, (out, projection.width), prox, weight_decay)


def mapped_as(
    model: nn.Module,
    name: str,
    beside: Projection | OneSided,
    shape: tuple[int, ...],
    prox: float = 0.0,
    weight_decay: float = 0.0,
) -> Coordinate:
    """Return a coordinate of a weight, from zero and of this shape, whose map is `beside`.

    prox, weight_decay: as in `Mapped`.
    """
    weight = model.get_parameter(name)
    start = torch.zeros(shape, dtype=wide(weight), device=weight.device)
    covers = weight.numel()
    return Coordinate(
        weight=name,
        parameter=nn.Parameter(start),
        rule=Mapped(map=beside, covers=covers, prox=prox, weight_decay=weight_decay),
        owner=model.get_submodule(name.rpartition(".")[0]),
        beside=beside,
        drawn=True,
    )


@torch.no_grad()
def from_zero(coordinate: Coordinate, run: Run) -> None:
    """Set a coordinate to zero, and shift the iterate that schedule-free optimizers keep for it."""
    own = coordinate.parameter.detach()
    for optimizer in run.optimizers:
        iterate = optimizer.state.get(coordinate.parameter, {}).get("z")
        if isinstance(iterate, Tensor) and iterate.shape == own.shape:
            iterate -= own
    own.zero_()


@dataclass(eq=False, kw_only=True)
class Subspace(Method):
    """The run-time state of passes that train some weights by small coordinates of them.

    total: parameters of the model.
    """

    name: str
    total: int
    projected: list[Coordinate] = field(default_factory=list)
    always: list[Coordinate] = field(default_factory=list)

    @property
    def coordinates(self) -> Sequence[Coordinate]:
        return [*self.projected, *self.always]

    def check_reached(self) -> None:
        missing = [c.weight for c in self.projected if not c.reached and not c.unused]
        if missing:
            raise CaptureError(
                f"{self.name}: {listed(missing)} is not read by a Linear of its own in the "
                "captured forward, so its input cannot be projected. Leave it out of targets=, or "
                "train it densely with always=[...]."
            )

    def lines(self) -> Iterable[tuple[str, str]]:
        numel = sum(each.numel for each in self.projected)
        yield "projected", f"{len(self.projected)} weights, by {numel:,} coordinates"
        always = sum(each.numel for each in self.always)
        yield "trained densely", f"{always:,} parameters, {always / self.total:.2%}"


@dataclass(eq=False, kw_only=True)
class Projecting(Subspace, ABC):
    """The run-time state of passes that project inputs: which weights, and since when.

    named: whether the user named the targets. period: the number of optimizer steps after which
    `redraw` is called. shared: whether all weights that read the same input share a projection.
    """

    named: bool
    period: int | None
    compiles = True
    shared: bool = True
    found: Rewritten = field(default_factory=Rewritten)
    round: int = 0
    steps: int = 0  # optimizer steps made in this round

    def rewrite(self, graph: GraphModule, inputs: Sequence[Any], saved: Saved) -> None:
        wanted = {each.weight for each in self.projected}
        project_linears(graph, inputs, wanted, self.found, self.shared)

    def check_reached(self) -> None:
        super().check_reached()
        if self.found.kept and self.named:
            warnings.warn(
                f"{self.name} does not reduce the activations at {self._kept()}. Gradient and "
                "optimizer state are smaller all the same. Add the other readers of the same input "
                "to targets=, or leave these weights out.",
                stacklevel=2,
            )

    def after_step(self, run: Run) -> None:
        self.steps += 1
        if self.steps == self.period:
            self.round += 1
            self.steps = 0
            self.redraw(run)
            for each in self.projected:
                if each.mapped:
                    each.mapped.since = run.step

    @abstractmethod
    def redraw(self, run: Run) -> None:
        """Begin a round: another projection, coordinates from zero."""

    def state(self) -> dict[str, Any]:
        origins = {each.weight: projection_of(each).origin for each in self.projected}
        return {"round": self.round, "steps": self.steps, "origins": origins}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.round, self.steps = state["round"], state["steps"]
        own = {each.weight: projection_of(each) for each in self.projected}
        for name, origin in state["origins"].items():
            if name != origin:
                own[name].share(own[origin])

    def lines(self) -> Iterable[tuple[str, str]]:
        yield from super().lines()
        if self.found.kept:
            yield "no activations saved", self._kept()
        if self.period is not None:
            yield "round", f"{self.round}, step {self.steps} of {self.period}"

    def _kept(self) -> str:
        by = self.found.kept
        return listed([f"{n} (its input is kept for {op})" for n, op in sorted(by.items())], 3)
