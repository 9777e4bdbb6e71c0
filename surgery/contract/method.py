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
    """The run that a pass is part of, as the hooks of its `Method` see it.

    model: the model that `surgery.apply` was given. step: the number of optimizer steps made.
    skipped: the number of optimizers' steps that were skipped, for gradients that were not finite.
    optimizers: all optimizers that have stepped the model. driving: those that make the current
    step. loss_scale: the scale of the GradScaler in the current step, 1 without one. rehearsal:
    whether the current forward is one of `surgery.report`, which must leave no trace.
    """

    @property
    def model(self) -> nn.Module: ...

    @property
    def step(self) -> int: ...

    @property
    def skipped(self) -> int: ...

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

    name: the name of the pass. coordinates: all coordinates that may ever be trained; empty for
    exact rewrites.
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
        """Change in place how a captured graph reads its weights. Runs before any `rewrite`."""

    def rewrite(self, graph: GraphModule, inputs: Sequence[Any], saved: Saved) -> None:
        """Rewrite a captured graph in place. Its weights are already read through gates.

        inputs: the inputs that the graph was captured with: fake tensors, and the model's own
        parameters. saved: what autograd saves in the graph as it is now. Checkpointed regions are
        graphs inside of it, see `saved.inner()`: rewrite and recompile them too. The graph itself
        is recompiled for you.
        """

    def check_reached(self) -> None:
        """Raise CaptureError if the rewrite did not happen. Runs after the first forward."""

    # -- forwards ---------------------------------------------------------------------------------

    def before_forward(self, arguments: Mapping[str, Any], run: Run) -> None:
        """Take the arguments of a training forward, by name."""

    def drive(self, forward: Callable[[], Any], run: Run) -> Any:
        """Return the output of a training forward, for a pass that replaces backward.

        forward: runs the captured forward; it may be called several times, until the next step has
        been made. A pass with this hook conflicts with EVERY other.
        """
        return forward()

    def adopt(self, coordinate: Coordinate) -> bool:
        """Sample another pass's mapped coordinate from now on, instead of its weight.

        Return False if this pass does not sample, or does not sample this weight as a whole.
        """
        return False

    # -- steps ------------------------------------------------------------------------------------

    def check(self, optimizer: Optimizer) -> None:
        """Raise OptimizerError if an optimizer does not suit the pass, before its first step."""

    def before_step(self, run: Run) -> None:
        """Prepare for an optimizer step, whose gradients have been computed.

        Raise OptimizerError if the step would do nothing. The step may still be skipped, for a
        gradient that is not finite; the hook then runs again before the next one.
        """

    def stepped(self, optimizer: Optimizer, run: Run) -> None:
        """Change mapped coordinates in place that an optimizer has just stepped.

        Runs before their steps are added to the weights.
        """

    def after_step(self, run: Run) -> None:
        """Do what is due after an optimizer step. `run.step` counts this step, too."""

    # -- saves and reports ------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs besides weights and coordinates.

        A dict of tensors, numbers and strings, which may be nested. Leave out what can be drawn
        from seeds again.
        """
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned, at any step of a run on a model of the same shapes.

        Set everything that a later step depends on, and draw again what `state` has left out.
        """

    def lines(self) -> Iterable[tuple[str, str]]:
        """Return what `report` says of the pass, as pairs (label, value)."""
        return ()


@dataclass(eq=False, kw_only=True)
class Counting(Method):
    """A method whose nodes draw new random numbers in each step.

    step: the number of optimizer steps made, those before a resume included.
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
