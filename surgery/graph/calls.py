"""Nodes of passes: functions of a pass that run inside captured graphs.

    @node
    def noisy(method: InputNoise, x: Tensor, place: str) -> Tensor: ...

    new = insert(graph, noisy, self, x, module_of(linear), before=linear)

One captured graph may serve many layers and outlives the model, so that a node holds no object but
the state of its pass, weakly; everything else that it is given are nodes, numbers and strings.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from surgery.compat.tensors import is_fake, leaves
from surgery.graph.reading import placeholders

F = TypeVar("F", bound=Callable[..., Any])


@overload
def node(run: F) -> F: ...
@overload
def node(*, cheap: bool = False, fake: Callable[..., Any] | None = None) -> Callable[[F], F]: ...
def node(run: Any = None, *, cheap: bool = False, fake: Callable[..., Any] | None = None) -> Any:
    """Make a module's function a node for `insert`. Its first argument is the state of the pass.

    cheap: whether `recompute` may run the node again in backward; it must then return the same.
    fake: a function of the same arguments, without the state, that returns the result in a dry run
    on tensors without memory (default: a tensor like its first one, for which nothing more is kept
    for backward). The function itself never runs in a dry run.
    """
    if run is None:
        return functools.partial(_node, cheap, fake)
    return _node(cheap, fake, run)


def _node(cheap: bool, fake: Callable[..., Any] | None, run: Any) -> Any:
    @functools.wraps(run)
    def call(owner: Owner, *args: Any) -> Any:
        if any(is_fake(each) for each in leaves(args)):
            return (fake or _like_first)(*args)
        return run(owner.method(), *args)

    call.cheap = cheap  # pyright: ignore[reportAttributeAccessIssue]
    return call


def is_cheap(call: Node) -> bool:
    """Whether a node was made by a pass as `cheap`, so that it may run again in backward."""
    return bool(getattr(call.target, "cheap", False))


def insert(
    graph: GraphModule, run: Callable[..., Any], method: Any, *args: Any, before: Node
) -> Node:
    """Insert a call of `run(method, *args)` into a graph before a node, and return the new node.

    run: a function made by `node`. args: nodes of this graph, numbers and strings. The new node
    belongs to the module that `before` comes from, and has the shape of the first node in `args`.
    """
    known = (each for each in _owners(graph) if _owner(graph, each).method() is method)
    owner = next(known, None) or _add_owner(graph, method)
    with graph.graph.inserting_before(before):
        made = graph.graph.call_function(run, (owner, *args))
    first = next((arg for arg in args if isinstance(arg, Node)), before)
    made.meta = {k: v for k, v in before.meta.items() if k != "example_value"}
    if "example_value" in first.meta:
        made.meta["example_value"] = first.meta["example_value"]
    return made


def put(graph: GraphModule, old: Node, run: Callable[..., Any], *args: Any) -> Node:
    """Put a call run(*args) in the place of a node."""
    with graph.graph.inserting_before(old):
        return take_place(graph.graph.call_function(run, args), old)


def take_place(new: Node, old: Node) -> Node:
    """Replace an old node by a new one, and erase the old one."""
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
    return new


class Owner(nn.Module):
    """The state of a pass, as an attribute of a graph."""

    def __init__(self, method: Any) -> None:
        super().__init__()
        self.method: Callable[[], Any] = weakref.ref(method)  # Dynamo's cache outlives the model


def _owners(graph: GraphModule) -> list[Node]:
    found = graph.graph.find_nodes(op="get_attr")
    return [n for n in found if isinstance(_owner(graph, n), Owner)]


def _owner(graph: GraphModule, attribute: Node) -> Any:
    return functools.reduce(getattr, str(attribute.target).split("."), graph)


def _add_owner(graph: GraphModule, method: Any) -> Node:
    name = f"surgery_{len(_owners(graph))}"
    graph.add_submodule(name, Owner(method))
    inputs = placeholders(graph)
    first = next(n for n in graph.graph.nodes if n not in set(inputs))
    with graph.graph.inserting_before(first):
        return graph.graph.get_attr(name)


class _Like(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _like_first(*args: Any) -> Tensor:
    return _Like.apply(next(each for each in args if isinstance(each, Tensor)))
