"""The contract of a pass: `Method`, its state on one model, and `Run`, what it sees of the run.

A pass is a frozen dataclass of options with one method, `start(model) -> Method`, which changes
nothing. The hooks of what it returns are called by the engine, in this order:

    apply      coordinates, additions, after, conflicts, compiles are read
    capture    reread(graph), then rewrite(graph, inputs, saved): once for each captured graph
    forward    before_forward(arguments, run), drive(forward, run); the first time check_reached()
    step       the first of an optimizer: check(optimizer); before_step(run); then, when it has made
               the step, stepped(optimizer, run), and once that is carried into the weights and
               counted, after_step(run)
    save, load state(), restore(state)
    report     lines()

A Method must pickle: models are copied and saved with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import nn
from torch.fx import GraphModule
from torch.optim import Optimizer

from surgery.graph.saved import Saved
from surgery.weights.additions import Addition
from surgery.weights.coordinate import Coordinate

EVERY = "*"  # in `after`, `before` and `conflicts`: all other passes


class Run(Protocol):
    """The run that a pass is part of, as its hooks see it.

    model: that `surgery.apply` was given. step: optimizer steps made. optimizers: all that have
    stepped the model; driving: those that made the step under way. loss_scale: of the GradScaler
    that drives the step under way, 1 without one. rehearsal: whether the forward under way is one
    of `surgery.report`, which leaves no trace.
    """

    @property
    def model(self) -> nn.Module: ...

    @property
    def step(self) -> int: ...

    @property
    def loss_scale(self) -> float: ...

    @property
    def rehearsal(self) -> bool: ...

    @property
    def optimizers(self) -> Iterable[Optimizer]: ...

    @property
    def driving(self) -> Sequence[Optimizer]: ...

    def forget(self, coordinates: Iterable[Coordinate]) -> None:
        """Free the optimizer state and the gradients of coordinates that leave or enter."""
        ...


class Method:
    """The run-time state of one pass on one model, made by the pass's `start(model)`.

    name: of the pass. coordinates: every one that may ever be trained; empty for exact rewrites.
    """

    name: str
    coordinates: Sequence[Coordinate] = ()
    # What `apply` puts on the model beside its own weights, and `remove` takes off.
    additions: Sequence[Addition] = ()

    # -- what it composes with, declared ----------------------------------------------------------

    # Names of passes whose rewrites come before this one's, or behind it, if they are applied too.
    # EVERY: all that do not say so themselves; a name counts before it. Others come in the order
    # given.
    after: ClassVar[Collection[str]] = ()
    before: ClassVar[Collection[str]] = ()
    # Name of a pass, or EVERY -> why the two cannot be applied together; {other} is the other one.
    # None: they can, whatever is said of EVERY.
    conflicts: ClassVar[Mapping[str, str | None]] = {}
    # Whether each step trains the same, so that a compiler may have its nodes.
    compiles: ClassVar[bool] = False
    # What makes few kernels of the cheap operations that no pass has taken: `fuse` of the kit, as a
    # staticmethod. Called behind all rewrites, where kernels are compiled.
    fuses: ClassVar[Callable[[GraphModule, Saved], Any] | None] = None

    # -- graphs -----------------------------------------------------------------------------------

    def reread(self, graph: GraphModule) -> None:
        """Change how a captured graph reads its weights, in place; before any `rewrite`."""

    def rewrite(self, graph: GraphModule, inputs: Sequence[Any], saved: Saved) -> None:
        """Rewrite a captured graph in place; its weights are read through gates already.

        inputs: what it was captured with, fake tensors and the model's own parameters. saved:
        autograd's account of the graph as it stands. Checkpointed regions are graphs inside, see
        `saved.inner()`: rewrite them too, and recompile them; the graph itself is recompiled.
        """

    def check_reached(self) -> None:
        """After the first training forward: raise CaptureError if the rewrite did not happen."""

    # -- forwards ---------------------------------------------------------------------------------

    def before_forward(self, arguments: Mapping[str, Any], run: Run) -> None:
        """Take the arguments of a training forward, by name."""

    def drive(self, forward: Callable[[], Any], run: Run) -> Any:
        """Return the output of a training forward; `forward` runs the captured one, as often as it
        is called, until the next step is carried.

        Of passes that replace backward. They conflict with EVERY other.
        """
        return forward()

    def adopt(self, coordinate: Coordinate) -> bool:
        """Decide from now on when another pass's mapped coordinate is trained, in place of its
        weight; False if this pass does not sample, or not this weight as a whole."""
        return False

    # -- steps ------------------------------------------------------------------------------------

    def check(self, optimizer: Optimizer) -> None:
        """Raise OptimizerError if this optimizer, about to step first, cannot serve the pass."""

    def before_step(self, run: Run) -> None:
        """Prepare for the optimizer step about to be made, whose gradients are there, or raise
        OptimizerError if it would do nothing. It may still be refused, and come again."""

    def stepped(self, optimizer: Optimizer, run: Run) -> None:
        """Change, in place, what an optimizer has made of mapped coordinates that it holds, before
        that is carried into the weights."""

    def after_step(self, run: Run) -> None:
        """Do what is due after an optimizer step; `run.step` steps have been made."""

    # -- saves and reports ------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what resuming needs besides weights and coordinates: tensors, numbers, strings,
        nested by name. What is drawn from seeds is left out."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned, at any step of a run on a model of the same shapes.

        Everything that a later step depends on is set: what `state` leaves out must be drawn anew.
        """

    def lines(self) -> Iterable[tuple[str, str]]:
        """Return what `report` says of the pass, as (label, value)."""
        return ()


@dataclass(eq=False, kw_only=True)
class Counting(Method):
    """A method whose nodes draw anew in each step.

    step: optimizer steps that have been made, after a resume too.
    """

    step: int = 0

    def after_step(self, run: Run) -> None:
        self.step = run.step

    def state(self) -> dict[str, Any]:
        return {"step": self.step}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]


def overrides(method: Method, hook: str) -> bool:
    """Whether a pass has a hook of its own."""
    return getattr(type(method), hook) is not getattr(Method, hook)
