"""Rewritten graphs given to a compiler: `surgery.apply(model, spec, backend="inductor")`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo.backends.registry import list_backends, lookup_backend
from torch.fx import GraphModule

from surgery.errors import CaptureError, OptionError, listed, near_misses
from surgery.lowering import Lowering

if TYPE_CHECKING:
    from surgery.state import Method

Backend: TypeAlias = str | Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]


def check_backend(methods: Iterable[Method], backend: Backend | None) -> None:
    """Raise OptionError if there is no such backend, or a pass whose nodes it would fix."""
    if backend is None:
        return
    moving = [method.name for method in methods if not method.fixed]
    if moving:
        raise OptionError(
            f"{name_of_backend(backend)} would compile what {listed(moving)} decides anew in each "
            "step, and so lose it. It works with recompute, chunked_loss, velora and rso. Leave "
            "backend= (or torch.compile) out: the rewritten graph then runs eagerly."
        )
    if isinstance(backend, str) and backend not in list_backends(exclude_tags=()):
        known = list_backends()
        raise OptionError(
            f"torch.compile has no backend {backend!r}.{near_misses(backend, known)} "
            f"There are {listed(known)}."
        )


def compiled(graph: GraphModule, inputs: Sequence[Any], backend: Backend) -> Callable[..., Any]:
    """Return what a backend makes of a rewritten graph. Raises CaptureError for random regions."""
    specs = [
        m.meta["spec"] for m in graph.modules() if isinstance(m, GraphModule) and "spec" in m.meta
    ]
    if any(spec.random for spec in specs):
        raise CaptureError(
            f"a dropout is to be recomputed, and {backend!r} would draw another mask for it. Set "
            "its probability to 0, leave recompute out, or leave backend= out."
        )
    chosen = lookup_backend(backend) if isinstance(backend, str) else backend
    lowered = Lowering(graph, inputs)
    made = chosen(lowered.graph, [*inputs, *lowered.examples.values()])  # pyright: ignore[reportArgumentType]

    def run(*args: Any) -> Any:
        more = lowered.given(args)
        # The first forward of a round draws: what v is made of is in the batch itself.
        return graph(*args) if more is None else made(*args, *more)

    return run if lowered.trained else made


def outer_backend() -> Backend | None:
    """Return the backend of a torch.compile around the model, None if there is none.

    Raises CaptureError while Dynamo traces us, which makes it give up and call us.
    """
    if torch.compiler.is_dynamo_compiling():
        raise CaptureError("surgery captures this model itself")
    made: Any = get_eval_frame_callback()
    if not callable(made):
        return None
    found: Any = made
    while (inner := getattr(found, "_torchdynamo_orig_backend", None)) is not None:
        found = inner
    if found is made:
        raise CaptureError(
            "torch.compile is around a model that surgery captures itself, and its backend cannot "
            'be found. Name it instead: surgery.apply(model, ..., backend="inductor").'
        )
    return found


def name_of_backend(backend: Backend) -> str:
    """Return what to call a backend; torch.compile wraps them."""
    known = getattr(backend, "compiler_name", None) or getattr(backend, "__name__", None)
    return backend if isinstance(backend, str) else str(known or type(backend).__name__)
