"""Functions of tensors as one launch on an accelerator, compiled one by one.

Bodies of captured graphs that do the same share what is compiled of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.node import map_arg

from surgery.compat import inductor
from surgery.compat.tensors import is_fake
from surgery.kernels import plan

T = TypeVar("T")


def launch(kernel: Callable[..., T], *args: Any, static: bool = False) -> T:
    """Run a kernel: as it is on a CPU, compiled on an accelerator, for all shapes at once.

    What changes from call to call must be a tensor: numbers and strings are compiled in. static:
    for the shapes of its first call, and for all others.
    """
    tensors = [value for value in args if isinstance(value, Tensor)]
    if not tensors or not compiles(tensors[0]):
        return kernel(*args)
    # An entry for each kind of arguments: Dynamo stops after eight of one function.
    kinds = (callable, lambda value: isinstance(value, (str, torch.dtype, bool)) or value is None)
    layout = tuple(
        (value.dtype, value.ndim)
        if isinstance(value, Tensor)
        else value
        if any(kind(value) for kind in kinds)
        else type(value)
        for value in args
    )
    return _kernel(kernel, layout, plan.counting(), static)(*args)


@cache
def _kernel(
    kernel: Callable[..., T], layout: object, count: bool, static: bool
) -> Callable[..., T]:
    if static:
        return Compiled(kernel, count)
    return inductor.compiled(kernel, dynamic=True, count=count)


class Compiled:
    """A function compiled for the shapes of its first call, and once for all others.

    Static shapes make the faster code, and most runs have only those; when lengths change there
    are two compilations, not one for each length.
    """

    def __init__(self, function: Callable[..., Any], count: bool) -> None:
        self.function = function
        self.count = count
        self.first: tuple[object, ...] | None = None
        self.made: dict[bool, Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        shapes = tuple(t.shape if isinstance(t, Tensor) else t for t in args)
        self.first = self.first or shapes
        other = shapes != self.first
        if other not in self.made:
            self.made[other] = inductor.compiled(self.function, other, self.count)
        return self.made[other](*args)


_BODIES: dict[tuple[object, ...], Compiled] = {}
_SHARED: dict[str, GraphModule] = {}


def body(graph: GraphModule, args: tuple[Any, ...]) -> Callable[..., Any]:
    """Return what runs a graph of cheap operations on these inputs: compiled, if it may be."""
    if not takes(graph, args):
        return graph.forward  # no call of a module: hooks on all modules are not meant
    return _compiled_once(_key(graph, args), lambda *args: graph(*args))


def takes(graph: GraphModule, args: Sequence[Any]) -> bool:
    """Whether a graph of cheap operations is compiled for these inputs."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    attributes = any(node.op == "get_attr" for node in graph.graph.nodes)
    return bool(tensors) and not attributes and compiles(tensors[0], graphs=True)


def pulled(
    graph: GraphModule, args: Sequence[Any], wanted: Sequence[int], roots: Sequence[int]
) -> Callable[..., tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """Return (*args, *slopes) -> the results of a graph and the gradients of some of its inputs,
    args[i] for i in `wanted`, given those of some results, `roots`: as one compiled function."""
    count, wanted, roots = len(args), tuple(wanted), tuple(roots)

    def pull(*given: Any) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        inputs, slopes = given[:count], given[count:]

        def forward(*some: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            full = list(inputs)
            for place, value in zip(wanted, some):  # noqa: B905 # strict= does not trace
                full[place] = value
            results = graph(*full)
            return tuple(results[root] for root in roots), tuple(results)

        _, back, results = torch.func.vjp(forward, *[inputs[i] for i in wanted], has_aux=True)
        return results, back(tuple(slopes))

    return _compiled_once((*_key(graph, args), wanted, roots), pull)


def _key(graph: GraphModule, args: Sequence[Any]) -> tuple[object, ...]:
    """Return all that Dynamo would compile a graph anew for: it stops after eight of one code."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    device = tensors[0].device.type
    return (
        _likeness(graph),
        tuple((t.dtype, t.ndim, t.requires_grad) for t in tensors),
        (torch.is_grad_enabled(), torch.is_autocast_enabled(device)),
        (torch.get_autocast_dtype(device), device, plan.counting()),
    )


def _compiled_once(key: tuple[object, ...], function: Callable[..., Any]) -> Compiled:
    if key not in _BODIES:
        _BODIES[key] = Compiled(function, plan.counting())
    return _BODIES[key]


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
    if torch.compiler.is_compiling():  # a compiler around us takes the operations themselves
        return False
    return plan.counting() or inductor.works(t.device.type)
