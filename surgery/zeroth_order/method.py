"""Gradients from forwards alone: the model is run at W + eps z and at W - eps z, without autograd.

The mid-point of what it returns is attached to the scalar coordinates by one autograd node: given
dL/dy, coordinate k gets scale * <dL/dy, (y+ - y-) / (2 eps)>, scale = 1 / sqrt(K) of K directions.
The loss may be computed in the model or outside of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.optim import Optimizer

from surgery.activations.fusing import fuse
from surgery.contract.method import EVERY, Method, Run
from surgery.kernels import directions
from surgery.ranks import rank_of_world
from surgery.weights import shards
from surgery.weights.coordinate import Coordinate, unique
from surgery.weights.table import TABLE
from surgery.zeroth_order.attach import Attach
from surgery.zeroth_order.conservative import Conservative
from surgery.zeroth_order.direction import perturbation_of
from surgery.zeroth_order.evaluation import Modes, Output, Same
from surgery.zeroth_order.guards import (
    check_given,
    other_world,
    unheard,
    warn_of_silence,
    warn_of_state,
)
from surgery.zeroth_order.rewrite import perturb_reads
from surgery.zeroth_order.slopes import evaluate, evaluate_beside

Estimate: TypeAlias = Literal["central", "one_sided", "forward"]
Update: TypeAlias = Literal["plain", "sign", "conservative"]

SILENT = 20  # steps running with a gradient of exactly zero before a warning


@dataclass(eq=False, kw_only=True)
class TwoPoint(Method):
    """The run-time state of a zeroth-order pass; also the `Probe` of its perturbations.

    weights: one coordinate for each weight; unless dense, all share one parameter of K scalars.
    """

    fuses = staticmethod(fuse)
    # Those that only choose weights may train others, by backward.
    conflicts: ClassVar = dict.fromkeys(("misa", "lisa", "badam")) | {
        EVERY: "it trains by forwards alone: nothing is kept for backward, and no gradient reaches "
        "a weight, so {other} has nothing to work on"
    }

    name: str
    seed: int
    kind: directions.Kind
    eps: float
    directions: int
    estimate: Estimate
    dense: bool
    update: Update
    per_rank: bool
    ranks: int  # that probe directions of their own; 1 unless per_rank
    groups: int = 1  # of weights, see `probes`
    decays: bool = False  # whether the pass has a weight decay of its own
    weights: list[Coordinate] = field(default_factory=list)
    above: list[Coordinate] = field(default_factory=list)  # trained by backward
    mixed: bool = False  # whether anything is, in the forward under way
    step: int = 0
    slot: int = 0
    shift: float | Tensor | None = None
    probed: bool = False  # a forward was evaluated since the last optimizer step
    skips: int = 0  # of the run, at that forward
    silent: int = 0
    journal: list[tuple[float, ...]] = field(default_factory=list)  # K scalars, learning rate
    written: dict[Modes, frozenset[str]] = field(default_factory=dict)  # buffers, see `Same`
    judged: Conservative | None = None  # what steps are judged by, if they are

    def __post_init__(self) -> None:
        if self.update == "conservative":
            self.judged = Conservative(method=self)

    @property
    def coordinates(self) -> Sequence[Coordinate]:
        return [*self.weights, *self.above]

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """What the optimizer steps by slopes."""
        return [each.parameter for each in unique(self.weights)]

    @property
    def slots(self) -> int:
        return self.directions * self.ranks

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(max(1.0, self.slots / self.groups))

    def probes(self, group: int, slot: int) -> bool:
        """Whether a direction of this step perturbs a group; directions take the groups in turn."""
        return (self.step * self.slots + slot) % self.groups == group

    def reread(self, graph: GraphModule) -> None:
        perturb_reads(graph, regions=self.mixed)

    # -- one evaluation ----------------------------------------------------------------------------

    def before_forward(self, arguments: Mapping[str, Any], run: Run) -> None:
        check_given(self.name, arguments)
        self.mixed = self._is_mixed(run.model)

    def drive(self, forward: Callable[[], Any], run: Run) -> Any:
        """Return the model's output, attached to the coordinates."""
        rank, world = rank_of_world()
        if self.per_rank and world != self.ranks:
            raise other_world(self.name, self.ranks, world)
        rank = rank if self.per_rank else 0
        slots = range(rank * self.directions, (rank + 1) * self.directions)
        same = Same(forward, run.model, self.written)
        last, middle, slopes = (evaluate_beside if self.mixed else evaluate)(self, same, slots)
        if not (self.mixed or run.rehearsal):
            same.keep()
        judged, counts = self.judged, not run.rehearsal
        again = None if judged is None else judged.again(same, last, counts)
        self.probed, self.skips = self.probed or not run.rehearsal, run.skipped
        weights = [p.read for p in self.weights] if self.dense else [self.weights[0].read]
        flat = [value for each in slopes for value in each]
        behind = middle if self.mixed else ()
        tensors = (*flat, *behind, *weights)
        attached = Attach.apply(self, slots, again, tuple(middle), len(flat), *tensors)
        return last.with_values(attached)

    def _is_mixed(self, model: nn.Module) -> bool:
        mine = {each.weight for each in self.weights}
        found = ((n, p) for n, p in model.named_parameters() if TABLE not in n.split("."))
        return any(p.requires_grad for name, p in found if name not in mine)

    def run_at(self, shift: float | None, run: Same) -> Output:
        """Return the output at W + shift z."""
        with self.at(shift):
            return Output(run())

    @contextmanager
    def at(self, shift: float | Tensor | None) -> Iterator[None]:
        """Let the model read its weights at W + shift z inside."""
        self.shift = shift
        try:
            yield
        finally:
            self.shift = None

    # -- the clock ---------------------------------------------------------------------------------

    def check(self, optimizer: Optimizer) -> None:
        if self.judged is not None:
            self.judged.check_weights()
        if not self.dense:
            warn_of_state(self.name, optimizer, self.weights[0].parameter, self.decays)

    def before_step(self, run: Run) -> None:
        # Of two optimizers, the one that comes first may have found the slope not to be finite.
        unheard_of = self.probed and run.skipped == self.skips
        if unheard_of and all(parameter.grad is None for parameter in self.parameters):
            raise unheard(self.name)
        if self.judged is not None:
            self.judged.check_kept()

    def stepped(self, optimizer: Optimizer, run: Run) -> None:
        scalars = self.weights[0].parameter
        for group in optimizer.param_groups:
            if not any(p is scalars for p in group["params"]):
                continue
            if self.update == "sign":
                shards.local(scalars.detach()).sign_().mul_(group["lr"])
            if self.judged is not None:
                scalars.detach().mul_(self.judged.share(scalars.item()))

    def after_step(self, run: Run) -> None:
        self._listen()
        self.probed = False
        if not self.dense:
            scalars = self.weights[0].parameter
            groups = [group for optimizer in run.driving for group in optimizer.param_groups]
            rates = [g["lr"] for g in groups if any(p is scalars for p in g["params"])]
            self.journal.append((*shards.whole(scalars.detach()).tolist(), float(rates[0])))
            scalars.detach().zero_()  # they stand for other directions from now on
            run.forget([each for each in self.weights if each.drawn][:1])
        before = [each for each in self.weights if each.drawn]
        self.advance()
        left = [each for each in before if not each.drawn]
        if self.dense and left:
            run.forget(left)

    def advance(self) -> None:
        """Begin the next step: other directions."""
        self.step += 1
        for each in self.weights:
            if each.mapped:
                each.mapped.since = self.step
            perturbation_of(each).forget()
        if self.judged is not None:
            self.judged.kept.clear()
        self.choose()

    def choose(self) -> None:
        """Train the weights that a direction of this step perturbs."""
        for each in self.weights:
            each.active = bool(perturbation_of(each).slots)

    def _listen(self) -> None:
        grads = [shards.whole(p.grad) for p in self.parameters if p.grad is not None]
        heard = any(bool(grad.any()) for grad in grads)
        self.silent = 0 if heard or not self.probed else self.silent + 1
        if self.silent == SILENT:
            warn_of_silence(self.name, self.eps, SILENT)

    def state(self) -> dict[str, Any]:
        notes = {c.weight: kept for c in self.weights if (kept := perturbation_of(c).state())}
        steps = torch.tensor(self.journal, dtype=torch.float64)
        return {"step": self.step, "silent": self.silent, "journal": steps, "weights": notes}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.step, self.silent, self.probed = state["step"], state["silent"], False
        self.journal = [tuple(row) for row in state["journal"].tolist()]
        self.choose()
        for each in self.weights:
            perturbation_of(each).restore(state["weights"].get(each.weight, {}))

    def lines(self) -> Iterable[tuple[str, str]]:
        numel = sum(each.size for each in self.weights)
        runs = {"central": 2 * self.directions, "one_sided": self.directions + 1}
        count = runs.get(self.estimate, self.directions)
        yield "perturbed", f"{len(self.weights)} weights, {numel:,} parameters, eps {self.eps:g}"
        if self.groups > 1:
            yield "groups", f"{self.groups} of neighbouring blocks, {self.slots} in each step"
        again = "" if self.judged is None else ", and 3 again at the step"
        if self.above:
            count, again = count + (self.estimate != "one_sided"), f"{again}, one of them kept"
            more = sum(each.size for each in self.above)
            yield "by backward", f"{len(self.above)} weights, {more:,} parameters"
        alone = "" if self.above else ", no backward"
        yield "forwards", f"{count} for each batch ({self.estimate}){again}{alone}"
        if self.dense:
            yield "dense", "gradients and optimizer state have the size of the weights"
