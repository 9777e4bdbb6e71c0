"""Taking out of a captured graph what computes nothing; results stay the same to the bit.

A Hugging Face block makes about a dozen such calls: casts to the dtype that a tensor has already,
the concatenation of keys and values with an empty cache, one `unsqueeze` of the rotary tables per
layer. Eager pays for each; a graph need not.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional

from surgery.compat.dynamo import surely
from surgery.graph.nodes import gate
from surgery.graph.reading import dtype_of, name_of, value_of, writes


def simplify(graph: GraphModule) -> None:
    """Remove casts to the same dtype, concatenations with nothing, and repeated unsqueezes; let
    what is written as x @ W^T be the Linear that it is."""
    _name_linears(graph)
    if any(writes(node) for node in graph.graph.nodes):
        return  # a value may be written in place: aliases would matter
    seen: dict[Any, Node] = {}
    for node in graph.graph.nodes:
        same = _same_value(node)
        if same is None and (node.op, node.target) == ("call_method", "unsqueeze"):
            same = seen.setdefault((node.target, node.args), node)
        if same is not None and same is not node:
            node.replace_all_uses_with(same)
            graph.graph.erase_node(node)
    for node in graph.graph.find_nodes(op="call_function", target=torch.tensor):
        if not node.users:
            graph.graph.erase_node(node)


def _name_linears(graph: GraphModule) -> None:
    for node in graph.graph.find_nodes(op="call_function", target=functional.linear):
        given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
        node.args = tuple(given[k] for k in ("input", "weight", "bias") if k in given)
        node.kwargs = {}
    for node in [*graph.graph.nodes]:
        called = node.target in (operator.matmul, torch.matmul, "matmul") and not node.kwargs
        if not called or len(node.args) != 2 or not all(isinstance(n, Node) for n in node.args):
            continue
        x, flipped = node.args
        weight = _flipped(flipped)
        if weight is None or weight.target is not gate:
            continue
        with graph.graph.inserting_before(node):
            named = graph.graph.call_function(functional.linear, (x, weight))
        named.meta = dict(node.meta)
        node.replace_all_uses_with(named)
        graph.graph.erase_node(node)
        if not flipped.users:
            graph.graph.erase_node(flipped)


def _flipped(node: Any) -> Node | None:
    """Return the matrix of which a node is the transpose."""
    source = node.args[0] if isinstance(node, Node) and node.args else None
    if not isinstance(source, Node) or getattr(value_of(node), "ndim", 0) != 2 or node.kwargs:
        return None
    name, rest = name_of(node), list(node.args[1:])
    if name == "getattr":  # of a real weight, as all are
        turned = rest in (["T"], ["mT"], ["H"], ["mH"])
    elif name in ("transpose", "swapaxes", "swapdims"):
        turned = rest in ([0, 1], [1, 0], [-1, -2], [-2, -1])
    elif name == "permute":
        turned = rest in ([1, 0], [(1, 0)], [[1, 0]])
    else:  # newer torch traces attributes as operators
        turned = name in ("t", "numpy_T", "mT", "matrix_H", "mH", "adjoint") and not rest
    return source if turned else None


def _same_value(node: Node) -> Node | None:
    """Return the node whose value this one only repeats."""
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor):
        return None
    if (node.op, node.target) == ("call_method", "to"):
        source, *rest = node.args
        only_dtype = rest == [value.dtype] and not node.kwargs
        if only_dtype and isinstance(source, Node) and dtype_of(source) == value.dtype:
            return source
    source = copied(node)
    return source if source is not None and _fills(source) else None


def copied(node: Node) -> Node | None:
    """Return the node that this one copies by concatenating it with an empty tensor, if it does."""
    parts = node.args[0] if node.target is torch.cat else None
    if not isinstance(parts, list | tuple):
        return None
    full = [part for part in parts if isinstance(part, Node) and not _is_empty(part)]
    only = len(full) == 1 < len(parts) and dtype_of(full[0]) == dtype_of(node)
    return full[0] if only else None


def _is_empty(node: Node) -> bool:
    return node.op == "call_function" and node.target is torch.tensor and node.args == ([],)


def _fills(node: Node) -> bool:
    """Whether a value fills its storage; a part of a fused projection keeps all of it alive."""
    value = node.meta["example_value"]
    size = value.numel() * value.element_size()
    return surely(value.untyped_storage().nbytes() == size)
