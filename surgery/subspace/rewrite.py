"""Putting projections into captured graphs: which Linears read which x, and who else keeps it."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from surgery.graph.calls import put
from surgery.graph.nodes import gate
from surgery.graph.reading import bodies, inside, is_linear, name_of, operands, placeholders
from surgery.graph.reduced import reduced
from surgery.graph.saved import Saved
from surgery.subspace import experts
from surgery.subspace.nodes import project, projected, projected_experts
from surgery.weights.sites import site_of


@dataclass(eq=False, kw_only=True)
class Rewritten:
    """Weights whose Linears were rewritten and whose x something else keeps, by what operation."""

    kept: dict[str, str] = field(default_factory=dict)


def project_linears(
    graph: GraphModule,
    inputs: Sequence[Any],
    wanted: Container[str],
    found: Rewritten,
    shared: bool = True,
) -> None:
    """Let the Linears of the wanted weights keep projections, in one captured graph, in place.

    shared: whether weights that read the same x keep one z between them.
    """
    names = _named(graph, inputs, wanted)
    if names:
        _rewrite(graph, {node: node for node in names}, shared)
        _look(graph, Saved(graph, inputs), names, found)


def reduce_linears(graph: GraphModule, inputs: Sequence[Any], wanted: Container[str]) -> None:
    """Let the Linears of the wanted weights reduce their gradients as they compute them.

    Changes one captured graph in place; see graph/reduced.py.
    """
    names = _named(graph, inputs, wanted)
    if names:
        _reduce(graph, {node: node for node in names})


def _named(graph: GraphModule, inputs: Sequence[Any], wanted: Container[str]) -> dict[Node, str]:
    """Return the inputs of a graph that are wanted weights, with their names."""
    found: dict[Node, str] = {}
    for node, value in zip(placeholders(graph), inputs, strict=True):
        site = site_of(value) if isinstance(value, Tensor) else None
        if site is not None and site.name in wanted:
            found[node] = site.name
    return found


def _reduce(graph: GraphModule, places: dict[Node, Node]) -> None:
    """places: see `_rewrite`."""
    _follow(graph, places)
    for node in [*graph.graph.nodes]:
        if is_linear(node) and operands(node)[1] in places:
            x, weight, *bias = operands(node)
            how = (bias[0] if bias else None, node.target is torch.addmm, places[weight])
            put(graph, node, reduced, x, weight, *how)
    for node, body in [*bodies(graph)]:
        _reduce(body, _carried_in(node, body, places))
        body.recompile()


def _follow(graph: GraphModule, places: dict[Node, Node]) -> None:
    """Add to places what gates and other passes make of them."""
    for node in graph.graph.nodes:
        source = _made_from(node)
        if source in places:
            places[node] = places[source]


def _rewrite(graph: GraphModule, places: dict[Node, Node], shared: bool) -> None:
    """places: what a Linear may read -> the input of the graph that is the model's own weight."""
    _follow(graph, places)
    groups: dict[tuple[Node, Node | None], list[Node]] = {}
    for node in graph.graph.nodes:
        found = _operands(node)
        if found and found[1] in places:
            groups.setdefault((_root(found[0]), None if shared else node), []).append(node)
    for readers in groups.values():
        x = _root(_operands(readers[0])[0])  # not the key: it may have been a reader, now replaced
        with graph.graph.inserting_before(min(readers)):
            own = [places[_operands(reader)[1]] for reader in readers]
            z = graph.graph.call_function(project, (x, *own))
        for reader in readers:
            _replace(graph, reader, z, places)
    for node, body in [*bodies(graph)]:
        _rewrite(body, _carried_in(node, body, places), shared)
        body.recompile()


def _replace(graph: GraphModule, reader: Node, z: Node, places: dict[Node, Node]) -> None:
    x, weight, *more = _operands(reader)
    if is_linear(reader):
        how = (more[0] if more else None, reader.target is torch.addmm, places[weight])
        put(graph, reader, projected, x, z, weight, *how)
    else:
        how = (*more, experts.is_fused(reader), places[weight])
        put(graph, reader, projected_experts, x, z, weight, *how)


def _made_from(node: Node) -> Node | None:
    """Return what a gate reads, or a node that another pass has put behind one."""
    if node.op != "call_function" or not (node.target is gate or "pass" in node.meta):
        return None
    return next((n for n in node.all_input_nodes if n.op != "get_attr"), None)


def _carried_in(node: Node, body: GraphModule, places: dict[Node, Node]) -> dict[Node, Node]:
    """Give a checkpointed region, which `node` runs, the weights themselves that it reads.

    Beside what it reads of them, which other passes may have changed, or change later.
    """
    found: dict[Node, Node] = {}
    for own, arg in zip(placeholders(body), [*node.args[1:]], strict=True):
        if isinstance(arg, Node) and arg in places:
            with body.graph.inserting_after(placeholders(body)[-1]):
                raw = body.graph.placeholder(f"{own.name}_itself")
            raw.meta = {k: v for k, v in own.meta.items() if k == "example_value"}
            node.args = (*node.args, places[arg])
            found[own] = found[raw] = raw
    return found


def _operands(node: Node) -> Sequence[Node]:
    """Return x, W and what else a Linear takes, or nothing."""
    return operands(node) if is_linear(node) else experts.read(node) or ()


def _root(node: Node) -> Node:
    """Return the tensor that a node only casts: fp32 adapters each cast x for themselves."""
    while name_of(node) in ("to", "float") and len(node.all_input_nodes) == 1:
        source, value = node.all_input_nodes[0], node.meta.get("example_value")
        known = source.meta.get("example_value")
        if not isinstance(value, Tensor) or not isinstance(known, Tensor):
            break
        if value.device != known.device:
            break
        node = source
    return node


def _look(graph: GraphModule, saved: Saved, names: dict[Node, str], found: Rewritten) -> None:
    """Note where x is kept in spite of its projection."""
    for node in graph.graph.nodes:
        if node.target not in (projected, projected_experts) or node.args[-1] not in names:
            continue
        x, place = node.args[0], node.args[-1]
        mine = saved.outputs[_root(x)] - saved.free
        others = [n for n, kept in saved.saves.items() if kept & mine and n is not node]
        if others:
            found.kept[names[place]] = name_of(others[0])
    for node, inner in saved.inner():
        _look(inner.module, inner, inside(inner.module, node, names), found)
