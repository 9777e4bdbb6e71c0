"""Where the logits of a loss come from: the head's Linear, and what lies between it and the loss.

Found in a captured graph, and cut out: the head and the loss then run together, in chunks.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.nn import functional

from surgery.activations.chunks import POINTWISE, chunked_cross_entropy
from surgery.graph.reading import name_of, operands, value_of


def find_head(loss: Node, keep_logits: bool) -> list[Node] | str:
    """Return the nodes from the head's Linear to the logits of a loss, or why that cannot be."""
    given = _arguments(loss)
    if given["weight"] is not None or given["reduction"] not in ("mean", "sum"):
        return "its cross entropy has class weights or no reduction"
    target = value_of(given["target"])
    if not isinstance(target, Tensor) or target.ndim != 1 or target.is_floating_point():
        return "its targets are not one class a row"
    chain, node = [], given["input"]
    while node.target is not functional.linear:
        sources = [s for s in node.all_input_nodes if isinstance(value_of(s), Tensor)]
        if len(sources) != 1 or not (name_of(node) in POINTWISE or _keeps_rows(node)):
            return f"its logits do not come from a Linear, but through {name_of(node)}"
        chain.insert(0, node)
        (node,) = sources
    chain.insert(0, node)
    names = [name_of(n) for n in chain]
    if "getitem" in names and ({"view", "reshape", "flatten"} & {*names[: names.index("getitem")]}):
        return "its logits are flattened before they are shifted"
    if "getitem" in names and keep_logits:
        return "its logits are shifted, and keep_logits=True would have to return the others too"
    for here, after in zip(chain, [*chain[1:], loss], strict=True):
        if any(user is not after and user.op != "output" for user in here.users):
            return "its logits are read by something else too"
    return chain


def _keeps_rows(node: Node) -> bool:
    """Whether a change of shape leaves the last dimension alone: a view, logits[..., :-1, :]."""
    before, after = value_of(node.all_input_nodes[0]), value_of(node)
    same = before.shape[-1] == after.shape[-1]
    return same and name_of(node) in ("view", "reshape", "flatten", "getitem")


def _arguments(loss: Node) -> dict[str, Any]:
    bound = inspect.signature(functional.cross_entropy).bind(*loss.args, **loss.kwargs)
    bound.apply_defaults()
    return bound.arguments


def chunk_head(
    graph: GraphModule,
    loss: Node,
    chain: list[Node],
    name: str,
    tokens: int | None,
    keep_logits: bool,
) -> None:
    """Put `chunked_cross_entropy` in the place of a loss and of its head, `find_head`'s result.

    name: of the submodule that the graph gets.
    """
    given = _arguments(loss)
    head, *after = chain
    hidden, *weights = operands(head)
    body = Graph()
    logits = shown = body.placeholder("logits")  # shown: what the model returns as logits
    output = graph.graph.output_node()
    with graph.graph.inserting_before(loss):
        for node in after:
            source = node.all_input_nodes[0]
            if name_of(node) in POINTWISE:
                logits = body.node_copy(node, lambda _, logits=logits: logits)
            elif name_of(node) == "getitem":
                before = hidden
                hidden = graph.graph.node_copy(
                    node, lambda n, s=source, b=before: b if n is s else n
                )
            if output in node.users:
                shown = logits
        body.output((logits, shown))
        graph.add_submodule(name, GraphModule(nn.Module(), body))
        module = graph.graph.get_attr(name)
        bias = weights[1] if len(weights) > 1 else None
        how = (given["ignore_index"], given["reduction"], given["label_smoothing"])
        args = (module, hidden, weights[0], bias, given["target"], *how)
        chunks = (tokens, keep_logits)
        new = graph.graph.call_function(chunked_cross_entropy, (*args, *chunks))
        value = graph.graph.call_function(operator.getitem, (new, 0))
        kept = graph.graph.call_function(operator.getitem, (new, 1)) if keep_logits else None
    value.meta = dict(loss.meta)
    loss.replace_all_uses_with(value)
    output.args = map_arg(output.args, lambda n: kept if n in chain else n)
    for node in [loss, *reversed(chain)]:
        graph.graph.erase_node(node)
