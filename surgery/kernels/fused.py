"""Functions of tensors as one launch on an accelerator, compiled one by one.

Bodies of captured graphs that do the same share what is compiled of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.node import map_arg

from surgery.compat import inductor, stage
from surgery.compat.tensors import is_fake, is_wrapper
from surgery.kernels import plan
from surgery.kernels.autocast import cast_now
from surgery.kernels.compiled import Compiled

T = TypeVar("T")


def launch(kernel: Callable[..., T], *args: Any, static: bool = False) -> T:
    """Run a kernel: as it is on a CPU, compiled on an accelerator, for all shapes at once.

    What changes from call to call must be a tensor or an integer: all else is compiled in. static:
    for the shapes of its first call, and for all others.
    """
    first = next((value for value in args if isinstance(value, Tensor)), None)
    if first is None or not compiles(first):
        return kernel(*args)
    return _run(kernel, kernel, args, first, static)


def run(graph: GraphModule, args: Sequence[Any]) -> tuple[Tensor, ...]:
    """Return the results of a graph that `takes` these inputs: one function, without autograd."""
    first = next(value for value in args if isinstance(value, Tensor))
    return _run(_likeness(graph), graph.forward, args, first, True)


def takes(graph: GraphModule, args: Sequence[Any]) -> bool:
    """Whether a graph of cheap operations is compiled for these inputs."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    if not tensors or any(is_wrapper(t) for t in tensors):
        return False
    return not graph.graph.find_nodes(op="get_attr") and compiles(tensors[0], graphs=True)


def pulled(
    graph: GraphModule,
    args: Sequence[Any],
    wanted: Sequence[int],
    roots: Sequence[int],
    slopes: Sequence[Tensor],
) -> tuple[Sequence[Tensor], list[Tensor | None]]:
    """Return the results of a graph and the gradients of its inputs, None but for args[i], i in
    `wanted`, given those of some results, `roots`: as one compiled function."""
    key = (_likeness(graph), "pulled", tuple(wanted), tuple(roots))
    function = partial(_pull, graph, len(args), tuple(wanted), tuple(roots))
    results, found = _run(key, function, (*args, *slopes), slopes[0], True)
    return results, _placed(found, wanted, len(args))


def gradients(
    graph: GraphModule, args: Sequence[Any], wanted: Sequence[int], slopes: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the gradients of the inputs as `pulled` does, given those of all results: as one
    compiled function that reads `reads(graph, args, wanted)` of the arguments only."""
    key = (_likeness(graph), "gradients", tuple(wanted))
    function = partial(_gradients, graph, len(args), tuple(wanted))
    found = _run(key, function, (*args, *slopes), slopes[0], True)
    return _placed(found, wanted, len(args))


def _placed(
    found: Sequence[Tensor | None], wanted: Sequence[int], count: int
) -> list[Tensor | None]:
    known = dict(zip(wanted, found, strict=True))
    return [known.get(place) for place in range(count)]


_READS: dict[object, frozenset[int]] = {}


def reads(graph: GraphModule, args: Sequence[Any], wanted: Sequence[int]) -> frozenset[int]:
    """Return the places of the arguments whose entries the gradients of a graph depend on."""
    values = ((t.shape, t.dtype) if isinstance(t, Tensor) else t for t in args)
    key = (_likeness(graph), *values, tuple(wanted))
    if key not in _READS:
        tensors = [t.detach() for t in args if isinstance(t, Tensor)]

        def run(*given: Tensor) -> Sequence[Tensor | None]:
            flow = iter(given)
            full = [next(flow) if isinstance(value, Tensor) else value for value in args]
            # Of their shapes, which are numbers here: no slope shall depend on a result.
            results = graph(*full)
            slopes = [torch.ones(r.shape, dtype=r.dtype, device=r.device) for r in results]
            return _gradients(graph, len(args), tuple(wanted), *full, *slopes)

        made, _ = inductor.traced(run, tensors, dynamic=False)
        used = [bool(node.users) for node in made.graph.find_nodes(op="placeholder")]
        flow = iter(used)
        _READS[key] = frozenset(
            place for place, t in enumerate(args) if isinstance(t, Tensor) and next(flow)
        )
    return _READS[key]


def _pull(
    graph: GraphModule, count: int, wanted: tuple[int, ...], roots: tuple[int, ...], *given: Any
) -> tuple[list[Tensor], list[Tensor | None]]:
    inputs, slopes = given[:count], given[count:]

    def forward(*some: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        full = [*inputs]
        for place, value in zip(wanted, some, strict=True):
            full[place] = value
        results = graph(*full)
        return tuple(results[root] for root in roots), tuple(results)

    made: Any = torch.func.vjp(forward, *[inputs[i] for i in wanted], has_aux=True)
    _, back, results = made
    return [*results], [*back(tuple(slopes))]


def _gradients(
    graph: GraphModule, count: int, wanted: tuple[int, ...], *given: Any
) -> list[Tensor | None]:
    roots = tuple(range(len(given) - count))
    return _pull(graph, count, wanted, roots, *given)[1]


# -- what is compiled ------------------------------------------------------------------------------

_MADE: dict[tuple[object, ...], Compiled] = {}


def _run(
    name: object, function: Callable[..., Any], args: Sequence[Any], first: Tensor, static: bool
) -> Any:
    """Run what is compiled of a function, known by a name, for this kind of arguments."""
    played = stage.current()
    if played is not None:
        with torch.no_grad():
            return played.one(getattr(function, "__name__", "kernel"), name, function, args)
    moving: list[Tensor | int] = []
    layout: list[object] = []
    for value in args:
        if isinstance(value, Tensor):
            moving.append(value)
            layout.append(value.dtype)
        elif type(value) is int:
            moving.append(value)
            layout.append(int)
        elif type(value) is tuple:  # of integers
            moving.extend(value)
            layout.append((len(value),))
        else:
            layout.append(_Fixed(value))
    cast = cast_now(first.device.type)
    key = (name, tuple(layout), static, cast, first.device, plan.counting())
    made = _MADE.get(key)
    if made is None:
        made = _MADE[key] = Compiled(_filled(function, layout), plan.counting(), static)
    return made(*moving)


class _Fixed(NamedTuple):
    value: Any


def _filled(function: Callable[..., T], layout: Sequence[object]) -> Callable[..., T]:
    """Return a function of the moving arguments of a call."""

    def run(*moving: Any) -> T:
        flow, args = iter(moving), []
        for kind in layout:
            if isinstance(kind, _Fixed):
                args.append(kind.value)
            elif isinstance(kind, tuple):
                args.append(tuple(next(flow) for _ in range(kind[0])))
            else:
                args.append(next(flow))
        return function(*args)

    return run


_SHARED: dict[str, GraphModule] = {}


def shared(graph: GraphModule) -> GraphModule:
    """Return the first graph that is like this: an argument of kernels, compiled for it."""
    return _SHARED.setdefault(_likeness(graph), graph)


def _likeness(graph: GraphModule) -> str:
    """Return what a graph does, with numbers for names: the blocks of a model are alike."""
    known = graph.meta.get("likeness")
    if known is None or known[0] is not graph.code:
        numbers = {node: f"%{place}" for place, node in enumerate(graph.graph.nodes)}
        lines = [
            (
                node.op,
                "" if node.op == "placeholder" else node.target,
                map_arg((node.args, node.kwargs), numbers.__getitem__),
            )
            for node in graph.graph.nodes
        ]
        known = graph.meta["likeness"] = (graph.code, repr(lines))
    return known[1]


def compiles(t: Tensor, graphs: bool = False) -> bool:
    """Whether kernels on a tensor are compiled, see `plan.compiles`; never in a dry run."""
    if not plan.compiles(t.device, graphs) or is_fake(t):
        return False
    if stage.current() is not None:
        return True
    if torch.compiler.is_compiling():  # a compiler around us takes the operations themselves
        return False
    return plan.counting() or inductor.works(t.device.type)
