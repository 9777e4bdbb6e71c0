"""What a chunk of the loss does to its logits, on an accelerator: read twice, overwritten once."""

from __future__ import annotations

import operator
from functools import cache

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node


def cross_entropy(
    z: Tensor,
    places: Tensor,
    share: Tensor,
    body: GraphModule,
    pull: GraphModule | None,
    smoothing: float,
) -> tuple[Tensor, Tensor | None]:
    """Return log softmax(l)[y] (n, 1) of logits l = body(z), and its sum over classes if some of
    the target is spread over all of them.

    z (n, V): becomes the gradient of sum_i share_i L_i, by `pull`, `gradient_of(body)`; stays if
    that is None. places (n, 1): the targets.
    """
    logits = body(z)
    # The sums are in float32 at least, as those of torch.log_softmax are.
    full = _full(logits)
    log_p = full - full.logsumexp(-1, keepdim=True)
    picked = log_p.gather(1, places).to(logits.dtype)
    spread = log_p.sum(-1).to(logits.dtype) if smoothing else None
    if pull is not None:
        classes = z.shape[-1]
        hit = torch.arange(classes, device=z.device)[None, :] == places
        target = torch.where(hit, 1.0 - smoothing, 0.0) + smoothing / classes
        slope = (log_p.exp() - target) * share[:, None]
        z.copy_(pull(z, slope.to(logits.dtype)))
    return picked, spread


def _full(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def normalizer(logits: Tensor) -> Tensor:
    """Return log sum exp of logits (n, V), in float32 at least: (n, 1)."""
    return _full(logits).logsumexp(-1, keepdim=True)


def slopes(
    z: Tensor,
    total: Tensor,
    d_total: Tensor,
    places: Tensor,
    d_picked: Tensor,
    body: GraphModule,
    pull: GraphModule,
) -> None:
    """Turn z (n, c) into the gradient by z of `normalizer` and of entries of body(z).

    total (n, 1): the normalizer of all classes, of which these are some. places, d_picked (n, k):
    of the entries; places that are not in 0 ... c - 1 are of other classes. pull:
    `gradient_of(body)`.
    """
    logits = body(z)
    full = _full(logits)
    # In place: `pull` begins at z, and where that is what is overwritten, has nothing to do.
    slope = full.sub_(total).exp_().mul_(d_total)
    if torch.compiler.is_compiling():
        columns = torch.arange(z.shape[-1], device=z.device)[None, :]
        for place, grad in zip(places.unbind(1), d_picked.unbind(1), strict=True):
            slope += torch.where(columns == place[:, None], grad[:, None], 0.0)
    else:
        inside = (places >= 0) & (places < z.shape[-1])
        places = places.clamp(0, z.shape[-1] - 1)
        slope.scatter_add_(1, places, torch.where(inside, d_picked, 0.0).to(slope.dtype))
    found = pull(z, slope.to(logits.dtype))
    if found is not z:
        z.copy_(found)


@cache
def gradient_of(body: GraphModule) -> GraphModule | None:
    """Return (z, dL/dl) -> dL/dz of a chain of operations by numbers; None if one has no rule."""
    graph, copies = Graph(), {}
    chain: list[Node] = []
    for node in body.graph.nodes:
        if node.op == "placeholder":
            copies[node] = graph.placeholder("z")
        elif node.op != "output":
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    slope = graph.placeholder("slope")
    node, *_ = body.graph.output_node().all_input_nodes
    while node.op != "placeholder":
        chain.append(node)
        (node,) = node.all_input_nodes
    for node in chain:
        (source,) = node.all_input_nodes
        found = _pulled(graph, node, copies[source], copies[node], slope)
        if found is None:
            return None
        slope = found
    graph.output(slope)
    # Placeholders come first: fx runs a graph in order.
    first = next(iter(graph.nodes))
    second = next(n for n in graph.nodes if n.op == "placeholder" and n is not first)
    first.append(second)
    return GraphModule(nn.Module(), graph)


def _pulled(graph: Graph, node: Node, x: Node, y: Node, slope: Node) -> Node | None:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    call, others = graph.call_function, [a for a in node.args if not isinstance(a, Node)]
    if name in ("float", "to", "contiguous"):
        return graph.call_method("type_as", (slope, x))
    if name == "tanh":
        square = call(operator.mul, (y, y))
        return call(operator.mul, (slope, call(operator.sub, (1, square))))
    if name not in ("mul", "div", "truediv") or node.kwargs or len(others) != 1:
        return None
    if name == "mul":
        return call(operator.mul, (slope, others[0]))
    if isinstance(node.args[0], Node):
        return call(operator.truediv, (slope, others[0]))
    return call(operator.mul, (slope, call(operator.neg, (call(operator.truediv, (y, x)),))))
