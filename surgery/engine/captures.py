"""Captures that models of one kind share: Dynamo traces a forward once for all of them.

Its guards say whether a graph serves another model, as they say whether it serves another call.
Each surgery rewrites a copy of its own when it first comes to run it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import nn
from torch.fx import GraphModule

from surgery.compat import dynamo, modules
from surgery.graph.lowering import duplicate
from surgery.graph.reading import name_modules
from surgery.weights.table import TABLE

STRUCTURES = 64  # captures of one frame before giving up: distinct input structures, not shapes


class Runner(Protocol):
    """A surgery, for the graphs that its forwards come to. pieces: graphs run by this forward."""

    model: nn.Module
    pieces: int

    def rewritten(self, graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Rewrite a graph, in place, and return what runs it."""
        ...


_running: ContextVar[Runner] = ContextVar("running")


@contextmanager
def running(runner: Runner) -> Iterator[None]:
    """Say whose training forward is under way inside, in this thread."""
    token = _running.set(runner)
    try:
        yield
    finally:
        _running.reset(token)


def is_running(runner: Runner) -> bool:
    """Whether a training forward of this surgery is under way, in this thread."""
    return _running.get(None) is runner


class Capture:
    """What Dynamo makes of the forward of models of one kind."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.run = dynamo.capture(forward, _traced, STRUCTURES)
        self.pieces = 0

    def serves(self, pieces: int) -> bool:
        """Whether a forward that ran so many graphs ran what the others run.

        Where a hook of one model breaks a graph, Dynamo's guards do not keep the pieces from the
        others: these go on alone, and nobody comes anew.
        """
        self.pieces = self.pieces or pieces
        if pieces == self.pieces:
            return True
        for kind, capture in [*CAPTURES.items()]:
            if capture is self:
                del CAPTURES[kind]
        return False


CAPTURES: weakref.WeakValueDictionary[Any, Capture] = weakref.WeakValueDictionary()


_kept: list[Capture] | None = None


@contextmanager
def kept() -> Iterator[None]:
    """Keep captures inside: one surgery after another comes to models of one kind."""
    global _kept
    before, _kept = _kept, []
    try:
        yield
    finally:
        _kept = before


def capture_of(model: nn.Module, under: Hashable = None) -> Capture | None:
    """Return the capture of the forward of a model's class, for models like this one. under: what
    else decides what forwards do, see `modules.around_all`.

    None for a model that is not like others: some module has hooks, or a forward of its own.
    """
    if any(modules.is_special(module) for module in model.modules() if module is not model):
        return None
    forward = type(model).forward
    parts = [(name, type(module)) for name, module in model.named_modules()]
    weights = [(name, type(p), p.shape, p.dtype, p.device) for name, p in model.named_parameters()]
    kind = (
        forward,
        under,
        tuple(each for each in parts if TABLE not in each[0].split(".")),
        tuple(each for each in weights if TABLE not in each[0].split(".")),
    )
    found = CAPTURES.get(kind)
    if found is None:
        found = CAPTURES[kind] = Capture(forward)
    if _kept is not None:
        _kept.append(found)
    return found


class Others:
    """What runs around or instead of forwards, see `modules.around_all`, as a model was captured.

    now: as it last was. known: what was captured under what was there before.
    """

    def __init__(self) -> None:
        self.kinds: dict[type[nn.Module], None] = {}
        self.now: tuple[Hashable, ...] | None = None
        self.known: dict[Hashable, tuple[Any, Any]] = {}

    def renewed(self, model: nn.Module, held: tuple[Any, Any]) -> tuple[Any, Any] | None:
        """Return what was captured under what is there now; None if that has not changed. held:
        what was captured so far."""
        if not self.kinds:
            own = [m for n, m in model.named_modules() if TABLE not in n.split(".")]
            self.kinds = {type(module): None for module in own}
        before, self.now = self.now, modules.around_all(self.kinds)
        if before is None or before == self.now:
            return None
        self.known[before] = held
        return self.known.pop(self.now, (None, None))


class _Trace:
    """One graph as Dynamo has traced it, and what runs it for each surgery."""

    def __init__(self, graph: GraphModule) -> None:
        self.graph = graph
        self.runs: weakref.WeakKeyDictionary[Runner, Callable[..., Any]] = (
            weakref.WeakKeyDictionary()
        )

    def __call__(self, *inputs: Any) -> Any:
        runner = _running.get()
        runner.pieces += 1
        run = self.runs.get(runner)
        if run is None:
            with dynamo.undisturbed():
                run = self.runs[runner] = runner.rewritten(duplicate(self.graph), inputs)
        return run(*inputs)


def _traced(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    name_modules(graph, _running.get().model)
    return _Trace(graph)
