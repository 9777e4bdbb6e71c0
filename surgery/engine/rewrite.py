"""Putting the nodes of all passes into captured graphs."""

from __future__ import annotations

import operator
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from surgery.compat.dynamo import CHECKPOINT
from surgery.contract.method import Method
from surgery.engine.decide import Decision
from surgery.errors import OptionError
from surgery.graph.nodes import checkpointed, gate, written
from surgery.graph.reading import name_of, placeholders
from surgery.graph.saved import Saved
from surgery.graph.simplify import simplify
from surgery.kernels import plan

_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
_REPLACES = "torch_Tensor_set_"  # weight.data = ...
LOG = "SURGERY_LOG"  # environment: "passes" prints what each pass does to each captured graph


def logged(what: str = "") -> bool:
    """Whether the environment asks for a log. Raises OptionError if it asks for one unknown."""
    asked = {word.strip() for word in os.environ.get(LOG, "").split(",")} - {""}
    unknown = sorted(asked - {"passes"})
    if unknown:
        raise OptionError(
            f"{LOG} asks for {', '.join(map(repr, unknown))}, which is not a known log. There is "
            f"only {LOG}=passes, which prints what each pass does to each captured graph."
        )
    return what in asked


def rewrite(
    graph: GraphModule, inputs: Sequence[Any], decision: Decision, taken: dict[str, int]
) -> None:
    """Rewrite one captured graph, in place.

    taken: pass -> bytes that it takes away of what is kept for backward, added up here. A node that
    a pass has put in bears its name, `node.meta["pass"]`.
    """
    reads = [
        node
        for node, value in zip(placeholders(graph), inputs, strict=True)
        if isinstance(value, nn.Parameter)
    ]
    _gate_reads(graph, reads)
    for body in _bodies(graph):
        _restore_checkpoints(body)
        simplify(body)
        body.recompile()
    for method in decision.methods:
        known = _nodes(graph)
        method.reread(graph)
        _sign(graph, known, method)
    saved = None
    if decision.rewriting:
        saved = Saved(graph, inputs)
        for method in decision.rewriting:
            saved = _apply(method, graph, inputs, saved, taken)
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    compiles = any(plan.compiles(t.device, graphs=True) for t in tensors)
    for method in [each for each in decision.methods if compiles and each.fuses][:1]:
        fuse: Any = method.fuses
        known = _nodes(graph)
        fuse(graph, saved or Saved(graph, inputs))
        _sign(graph, known, method)
    graph.recompile()


def _apply(
    method: Method,
    graph: GraphModule,
    inputs: Sequence[Any],
    saved: Saved,
    taken: dict[str, int],
) -> Saved:
    """Let one pass rewrite a graph; return the account of what has become of it."""
    known, start = _nodes(graph), time.perf_counter()
    method.rewrite(graph, inputs, saved)
    added, now = _sign(graph, known, method), Saved(graph, saved.inputs, saved.mode)
    away = saved.total - now.total
    taken[method.name] = taken.get(method.name, 0) + away
    if logged("passes"):
        seconds = time.perf_counter() - start
        print(
            f"surgery: {method.name}: {seconds:.2f} s, {added} nodes added to {len(known)}, "
            f"{abs(away) / 1e6:,.2f} MB {'less' if away >= 0 else 'more'} kept for backward",
            file=sys.stderr,
        )
    return now


def _bodies(graph: GraphModule) -> list[GraphModule]:
    """Return a graph and those that it runs."""
    return [module for module in graph.modules() if isinstance(module, GraphModule)]


def _nodes(graph: GraphModule) -> set[Node]:
    return {node for body in _bodies(graph) for node in body.graph.nodes}


def _sign(graph: GraphModule, known: set[Node], method: Method) -> int:
    """Mark the nodes that a pass has put into a graph; return their number."""
    fresh = _nodes(graph) - known
    for node in fresh:
        node.meta.setdefault("pass", method.name)
    return len(fresh)


def _gate_reads(graph: GraphModule, reads: list[Node]) -> None:
    # Every parameter, not only the targets: the graph may be reused for a layer whose weights are.
    first = next(node for node in graph.graph.nodes if node.op != "placeholder")
    for node in reads:
        users = list(node.users)
        writing = [user for user in users if _writes(user, node)]
        with graph.graph.inserting_before(first):
            whole = graph.graph.call_function(written, (node,)) if writing else node
        if writing:
            whole.meta = {k: v for k, v in node.meta.items() if k == "example_value"}
        # What a forward writes it reads as it is then, each time.
        for place, those in [(user, [user]) for user in users] if writing else [(first, users)]:
            with graph.graph.inserting_before(place):
                gated = graph.graph.call_function(gate, (whole if place in writing else node,))
            for user in those:
                user.replace_input_with(node, whole if name_of(user) == _REPLACES else gated)


def _writes(node: Node, weight: Node) -> bool:
    """Whether a node changes a weight in place: a constraint, `nn.Embedding(max_norm=)`."""
    name, args = name_of(node), node.args
    if name in ("embedding", "embedding_bag"):
        return node.kwargs.get("max_norm", args[3] if len(args) > 3 else None) is not None
    in_place = name.endswith("_") and not name.endswith("__")
    return (in_place or node.target in _IN_PLACE) and bool(args) and args[0] is weight


def _restore_checkpoints(graph: GraphModule) -> None:
    for node in graph.graph.find_nodes(op="call_function", target=CHECKPOINT):
        node.target = checkpointed
