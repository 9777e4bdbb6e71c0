"""Asking a captured graph: what a node calls, writes, draws, and which module it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional

from surgery.compat.dynamo import stack_of
from surgery.graph.nodes import checkpointed

T = TypeVar("T")

# By name, as functions and as methods: pointwise operations, norms and casts.
SIMPLE = frozenset(
    ["add", "sub", "rsub", "mul", "truediv", "div", "neg", "pow", "square", "abs", "clamp"]
    + ["rsqrt", "sqrt", "reciprocal", "exp", "log", "sin", "cos", "erf", "mean"]
    + ["sigmoid", "tanh", "relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish"]
    + ["hardswish", "softplus", "layer_norm", "rms_norm"]
    + ["to", "float", "half", "bfloat16", "type_as"]
)
_RANDOM = ("dropout", "rrelu", "bernoulli", "rand", "multinomial", "normal", "scaled_dot_product")
_INPLACE_OPERATORS = frozenset(
    ["setitem", "delitem", "iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod"]
    + ["ipow", "ilshift", "irshift", "iand", "ior", "ixor", "iconcat"]
)


def name_of(node: Node) -> str:
    """Return the name of the function or method that a node calls, or an empty string."""
    if node.op not in ("call_function", "call_method"):
        return ""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def value_of(node: Node) -> Any:
    """Return a node's result at capture time, where tensors have a shape but no data."""
    return node.meta.get("example_value")


def dtype_of(node: Node) -> torch.dtype | None:
    """Return the dtype of a node's result, None if that is no tensor."""
    value = value_of(node)
    return value.dtype if isinstance(value, Tensor) else None


def is_linear(node: Node) -> bool:
    """Whether a node is x W^T + b or, as in GPT-2, addmm(b, x, W)."""
    if node.op != "call_function" or node.kwargs:
        return False
    return node.target in (functional.linear, torch.addmm)


def operands(linear: Node) -> list[Node]:
    """Return the input of a Linear, the weight, and the bias if there is one."""
    given = [arg for arg in linear.args if isinstance(arg, Node)]
    if linear.target is torch.addmm:
        bias, *rest = given
        return [*rest, bias]
    return given


def is_random(node: Node) -> bool:
    """Whether a node draws from torch's generators."""
    name = name_of(node)
    if not any(word in name for word in _RANDOM):
        return False
    off = node.kwargs.get("training") is False or node.kwargs.get("p") == 0.0
    return not off


def writes(node: Node) -> bool:
    """Whether a node may write into an input: `add_`, `operator.iadd`, `x[i] = y`, `out=`."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    name = getattr(node.target, "__name__", "")
    inplace = name.endswith("_") and not name.endswith("__")
    module = getattr(node.target, "__module__", "") or ""
    operator = module == "_operator" and name in _INPLACE_OPERATORS
    return inplace or operator or "out" in node.kwargs or node.kwargs.get("inplace") is True


# -- modules ---------------------------------------------------------------------------------------


def name_modules(graph: GraphModule, model: nn.Module) -> None:
    """Note at each node of a captured graph, and of its checkpoints, whose module it comes from."""
    names = {id(module): name for name, module in model.named_modules()}
    for body in [m for m in graph.modules() if isinstance(m, GraphModule)]:
        for node in body.graph.nodes:
            stack = stack_of(node)
            if stack:
                number, path = stack[-1]
                node.meta["module"] = names.get(number, path)


def module_of(node: Node) -> str:
    """Return the model's own name of the module that a node comes from, or an empty string."""
    for near in (node, *node.users):
        if "module" in near.meta:
            return near.meta["module"]
    return ""


# -- checkpointed regions --------------------------------------------------------------------------


def placeholders(graph: GraphModule) -> list[Node]:
    """Return the inputs of a graph."""
    return list(graph.graph.find_nodes(op="placeholder"))


def bodies(graph: GraphModule) -> Iterable[tuple[Node, GraphModule]]:
    """Return the checkpointed regions of a graph: the node that runs each, and its graph."""
    for node in graph.graph.find_nodes(op="call_function", target=checkpointed):
        where = node.args[0]
        assert isinstance(where, Node)
        body = graph.get_submodule(str(where.target))
        assert isinstance(body, GraphModule)
        yield node, body


def all_graphs(graph: GraphModule) -> Iterator[GraphModule]:
    """Return a graph and its checkpointed regions, inner ones first."""
    for _, body in bodies(graph):
        yield from all_graphs(body)
    yield graph


def inside(body: GraphModule, node: Node, known: Mapping[Node, T]) -> dict[Node, T]:
    """Return what is known of the arguments of a checkpointed region by its own placeholders.

    node: what runs the region, `body`.
    """
    given = zip(placeholders(body), node.args[1:], strict=True)
    return {own: known[arg] for own, arg in given if isinstance(arg, Node) and arg in known}
