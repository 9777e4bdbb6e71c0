"""Putting perturbed reads into captured graphs."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.nn import functional

from surgery.graph.nodes import checkpointed, gate
from surgery.graph.reading import bodies, dtype_of, inside, is_linear, name_of, placeholders
from surgery.zeroth_order.nodes import (
    HALF,
    perturb,
    perturb_wide,
    perturbed_addmm,
    perturbed_embedding,
    perturbed_linear,
)

LOSSES = frozenset(
    [
        functional.cross_entropy,
        functional.nll_loss,
        functional.mse_loss,
        functional.l1_loss,
        functional.smooth_l1_loss,
        functional.binary_cross_entropy_with_logits,
    ]
)


def perturb_reads(graph: GraphModule, regions: bool = False) -> None:
    """Let every read of a weight in a captured graph be a perturbed one, in place.

    regions: leave checkpointed regions as they are, since a backward recomputes them.
    """
    while not regions and (region := next(iter(bodies(graph)), None)):
        _inline(graph, *region)
    reads = graph.graph.find_nodes(op="call_function", target=gate)
    _perturb(graph, {read: read.args[0] for read in reads})
    for read in reads:
        # Nodes know a weight by identity, which a gate of one that is trained in a copy takes away.
        read.replace_all_uses_with(read.args[0])  # pyright: ignore[reportArgumentType]
        graph.graph.erase_node(read)


def _perturb(graph: GraphModule, reads: Mapping[Node, Any]) -> None:
    """Let the users of reads be perturbed ones. reads: node -> the weight that it is."""
    for node, body in bodies(graph):
        _perturb(body, inside(body, node, reads))
        body.recompile()
    for read, weight in reads.items():
        for user in [user for user in read.users if user.target is not checkpointed]:
            if not _in_place_of(user, read):
                _before(graph, user, read, weight)
    for node in [n for n in graph.graph.nodes if n.target in LOSSES]:
        values = node.args[0]
        if isinstance(values, Node) and dtype_of(values) in HALF:
            with graph.graph.inserting_before(node):
                full = graph.graph.call_method("float", (values,))
            node.replace_input_with(values, full)


def _inline(graph: GraphModule, node: Node, body: GraphModule) -> None:
    """Run a checkpointed region as it is: nothing is kept that could be recomputed."""
    inner = placeholders(body)
    copies: dict[Node, Any] = dict(zip(inner, node.args[1:], strict=True))
    where = node.args[0]
    assert isinstance(where, Node)
    with graph.graph.inserting_before(node):
        for each in body.graph.nodes:
            if each.op in ("placeholder", "output"):
                continue
            copies[each] = graph.graph.node_copy(each, lambda n: copies[n])
            if each.op in ("get_attr", "call_module"):
                copies[each].target = f"{where.target}.{each.target}"
    (output,) = body.graph.find_nodes(op="output")
    results: Any = map_arg(output.args[0], lambda n: copies[n])
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(results, list | tuple):
            place: Any = user.args[1]
            user.replace_all_uses_with(results[place])
            graph.graph.erase_node(user)
    if isinstance(results, Node):
        node.replace_all_uses_with(results)
    graph.graph.erase_node(node)


def _in_place_of(user: Node, read: Node) -> bool:
    """Let a Linear or an embedding that reads the weight add what it has to add by itself."""
    args: tuple[Any, ...] = user.args
    if user.target is functional.embedding:
        given = dict(zip(("input", "weight", "padding_idx", "max_norm"), args, strict=False))
        given |= user.kwargs  # of the rest, without autograd, only max_norm matters
        if given["weight"] is not read or given.get("max_norm") is not None:
            return False
        user.target, user.args, user.kwargs = perturbed_embedding, (given["input"], read), {}
        return True
    if is_linear(user):
        source = args[1] if user.target is torch.addmm else args[0]
        if source is not read:
            user.target = perturbed_addmm if user.target is torch.addmm else perturbed_linear
    return user.target in (perturbed_linear, perturbed_addmm)


def _before(graph: GraphModule, user: Node, read: Node, weight: Node) -> None:
    """Form the perturbed weight right before the operation that reads it."""
    value = weight.meta["example_value"]
    narrow = value.ndim <= 1 and value.dtype in HALF
    cast = narrow and dtype_of(user) in HALF
    with graph.graph.inserting_before(user):
        moved = graph.graph.call_function(perturb_wide if narrow else perturb, (read,))
        user.replace_input_with(read, moved)
        promotes = name_of(user) in ("mul", "add")  # by itself, in the operation
        for other in [n for n in user.all_input_nodes if cast and not promotes and n is not moved]:
            if dtype_of(other) in HALF:
                full = graph.graph.call_method("float", (other,))
                user.replace_input_with(other, full)
    if cast:
        with graph.graph.inserting_after(user):
            back = graph.graph.call_method("to", (user, dtype_of(user)))
        back.meta = dict(user.meta)
        user.replace_all_uses_with(back, delete_user_cb=lambda each: each is not back)
