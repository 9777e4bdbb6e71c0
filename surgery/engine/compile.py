"""Rewritten graphs given to a compiler: `surgery.apply(model, spec, backend="inductor")`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch.fx import GraphModule

from surgery.compat.dynamo import Backend, backend_named, backends, name_of_backend
from surgery.contract.method import Method
from surgery.errors import CaptureError, OptionError, listed, near_misses
from surgery.graph.lowering import Lowering


def check_backend(methods: Iterable[Method], backend: Backend | None) -> None:
    """Raise OptionError if there is no such backend, or a pass whose nodes it would fix."""
    if backend is None:
        return
    moving = [method.name for method in methods if not method.compiles]
    if moving:
        raise OptionError(
            f"{name_of_backend(backend)} would freeze what {listed(moving)} decides anew in each "
            "step. Leave backend= (or torch.compile) out: the rewritten graph then runs eagerly. "
            "(Passes that can be compiled say so: `compiles = True`.)"
        )
    if isinstance(backend, str) and backend not in backends(hidden=True):
        known = backends()
        raise OptionError(
            f"torch.compile has no backend {backend!r}.{near_misses(backend, known)} "
            f"There are {listed(known)}."
        )


def compiled(graph: GraphModule, inputs: Sequence[Any], backend: Backend) -> Callable[..., Any]:
    """Return what a backend makes of a rewritten graph. Raises CaptureError for random regions."""
    if any(m.meta.get("draws") for m in graph.modules() if isinstance(m, GraphModule)):
        raise CaptureError(
            f"a dropout would be recomputed, and {backend!r} would draw another mask for it. Set "
            "its probability to 0, leave out the pass that recomputes it, or leave backend= out."
        )
    lowered = Lowering(graph, inputs)
    made = backend_named(backend)(lowered.graph, [*inputs, *lowered.examples.values()])

    def run(*args: Any) -> Any:
        more = lowered.given(args)
        # The first forward of a round draws: what is projected on may be in the batch itself.
        return graph(*args) if more is None else made(*args, *more)

    return run if lowered.trained else made
