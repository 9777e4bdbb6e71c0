"""Functions of tensors as one launch on an accelerator, compiled one by one.

Bodies of captured graphs that have the same code share what is compiled of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from surgery.compat import inductor
from surgery.compat.tensors import is_fake
from surgery.kernels import plan

T = TypeVar("T")


def launch(kernel: Callable[..., T], *args: Any) -> T:
    """Run a kernel: as it is on a CPU, compiled on an accelerator, for all shapes at once.

    What changes from call to call must be a tensor: numbers and strings are compiled in.
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
    return _kernel(kernel, layout, plan.counting())(*args)


@cache
def _kernel(kernel: Callable[..., T], layout: object, count: bool) -> Callable[..., T]:
    return inductor.compiled(kernel, dynamic=True, count=count)


class Body:
    """The body of a region, compiled for the shapes of its first call, and once for all others.

    Static shapes make the faster code, and most runs have only those; when lengths change there
    are two compilations, not one for each length.
    """

    def __init__(self, graph: GraphModule, count: bool) -> None:
        self.run = lambda *args: graph(*args)
        self.count = count
        self.first: tuple[object, ...] | None = None
        self.made: dict[bool, Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        shapes = tuple(t.shape if isinstance(t, Tensor) else t for t in args)
        self.first = self.first or shapes
        other = shapes != self.first
        if other not in self.made:
            self.made[other] = inductor.compiled(self.run, other, self.count)
        return self.made[other](*args)


_BODIES: dict[tuple[object, ...], Body] = {}
_SHARED: dict[str, GraphModule] = {}


def body(graph: GraphModule, args: tuple[Any, ...]) -> Callable[..., Any]:
    """Return what runs a graph of cheap operations on these inputs: compiled, if it may be."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    attributes = any(node.op == "get_attr" for node in graph.graph.nodes)
    if not tensors or attributes or not compiles(tensors[0], graphs=True):
        return graph.forward  # no call of a module: hooks on all modules are not meant
    device = tensors[0].device.type
    # All that Dynamo would compile anew for: it stops after eight of one function.
    key = (
        graph.code,
        tuple((t.dtype, t.ndim, t.requires_grad) for t in tensors),
        (torch.is_grad_enabled(), torch.is_autocast_enabled(device)),
        (torch.get_autocast_dtype(device), device, plan.counting()),
    )
    return _BODIES.setdefault(key, Body(graph, plan.counting()))


def shared(graph: GraphModule) -> GraphModule:
    """Return the first graph of this code: an argument of kernels, which are compiled for it."""
    return _SHARED.setdefault(graph.code, graph)


def compiles(t: Tensor, graphs: bool = False) -> bool:
    """Whether kernels on a tensor are compiled, see `plan.compiles`; never in a dry run."""
    if not plan.compiles(t.device, graphs) or is_fake(t):
        return False
    if torch.compiler.is_compiling():  # a compiler around us takes the operations themselves
        return False
    return plan.counting() or inductor.works(t.device.type)
