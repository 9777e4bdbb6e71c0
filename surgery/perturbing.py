"""Putting perturbed reads into captured graphs, and the nodes that make them.

A node finds what it has to add by the identity of the weight that it is given; a weight that has
none is read as it is. No node lets autograd see a weight.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.nn import functional

from surgery import nodes
from surgery.coordinates import site_of, wide
from surgery.ledger import bodies
from surgery.perturbation import LowRank, Perturbation, parts
from surgery.regions import is_linear

HALF = (torch.bfloat16, torch.float16)
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


def found(weight: Any) -> Perturbation | None:
    """Return what stands beside a weight, and note that a graph has read it."""
    if isinstance(weight, FakeTensor) or not isinstance(weight, Tensor):
        return None
    site = site_of(weight)
    if site is None:
        return None
    site.reached = True
    return site.pieces[0].note


def perturb(weight: Tensor) -> Tensor:
    """Return a weight as it shall be read now."""
    beside = found(weight)
    return weight.detach() if beside is None else beside.perturbed(weight.dtype)


def perturb_wide(weight: Tensor) -> Tensor:
    """Return a vector in float32: in bfloat16, most of a norm's entries would not move."""
    beside = found(weight)
    dtype = wide(weight)
    return weight.detach().to(dtype) if beside is None else beside.perturbed(dtype)


def perturbed_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b with what is added to W and b."""
    return _linear(x, weight, bias, transposed=False)


def perturbed_addmm(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return b + x W, as GPT-2 does it, with what is added to W and b."""
    return _linear(x, weight, bias, transposed=True)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    beside = found(weight)
    half = bias is not None and bias.dtype in HALF
    plain = None if bias is None or half else perturb(bias)
    if beside is None or isinstance(beside, LowRank):
        matrix = weight.detach()
        y = functional.linear(x, matrix.t() if transposed else matrix, plain)
        y = y if beside is None else beside.add_to(y, x, transposed)
    else:
        y = beside.multiply(x, transposed, plain)
    if half:
        assert bias is not None
        y = (y.to(wide(y)) + perturb_wide(bias)).to(y.dtype)
    return y


def perturbed_embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Return rows of W with what is added to them; z is drawn for these rows only."""
    beside = found(weight)
    y = functional.embedding(ids, weight.detach())
    if beside is None or beside.probe.shift is None:
        return y
    if ids.numel() >= weight.shape[0]:
        return functional.embedding(ids, beside.perturbed(weight.dtype))
    shift, slot, flat = beside.probe.shift, beside.probe.slot, ids.reshape(-1)
    if isinstance(shift, Tensor):
        z = beside.gather(slot, flat).view(y.shape)
        return y + shift.to(y.dtype) * z.to(y.dtype)
    rows = y.view(-1, weight.shape[1])
    for part in parts(rows):
        torch.add(rows[part], beside.gather(slot, flat[part]), alpha=shift, out=rows[part])
    return y


def perturb_reads(graph: GraphModule) -> None:
    """Let every read of a weight in a captured graph be a perturbed one, in place."""
    while region := next(iter(bodies(graph)), None):
        _inline(graph, *region)
    for gate in graph.graph.find_nodes(op="call_function", target=nodes.gate):
        for user in list(gate.users):
            if not _in_place_of(user, gate):
                _before(graph, user, gate)
    for node in [n for n in graph.graph.nodes if n.target in LOSSES]:
        values = node.args[0]
        if isinstance(values, Node) and _dtype(values) in HALF:
            with graph.graph.inserting_before(node):
                full = graph.graph.call_method("float", (values,))
            node.replace_input_with(values, full)


def _inline(graph: GraphModule, node: Node, body: GraphModule) -> None:
    """Run a checkpointed region as it is: nothing is kept that could be recomputed."""
    inner = body.graph.find_nodes(op="placeholder")
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


def _in_place_of(user: Node, gate: Node) -> bool:
    """Let a Linear or an embedding that reads the weight add what it has to add by itself."""
    args: tuple[Any, ...] = user.args
    if user.target is functional.embedding:
        given = dict(zip(("input", "weight", "padding_idx", "max_norm"), args, strict=False))
        given |= user.kwargs  # of the rest, without autograd, only max_norm matters
        if given["weight"] is not gate or given.get("max_norm") is not None:
            return False
        user.target, user.args, user.kwargs = perturbed_embedding, (given["input"], gate), {}
        return True
    if is_linear(user):
        source = args[1] if user.target is torch.addmm else args[0]
        if source is not gate:
            user.target = perturbed_addmm if user.target is torch.addmm else perturbed_linear
    return user.target in (perturbed_linear, perturbed_addmm)


def _before(graph: GraphModule, user: Node, gate: Node) -> None:
    """Form the perturbed weight right before the operation that reads it."""
    weight = gate.args[0]
    assert isinstance(weight, Node)
    value = weight.meta["example_value"]
    narrow = value.ndim <= 1 and value.dtype in HALF
    cast = narrow and _dtype(user) in HALF
    with graph.graph.inserting_before(user):
        read = graph.graph.call_function(perturb_wide if narrow else perturb, (gate,))
        user.replace_input_with(gate, read)
        for other in [n for n in user.all_input_nodes if cast and n is not read]:
            if _dtype(other) in HALF:
                full = graph.graph.call_method("float", (other,))
                user.replace_input_with(other, full)
    if cast:
        with graph.graph.inserting_after(user):
            back = graph.graph.call_method("to", (user, _dtype(user)))
        back.meta = dict(user.meta)
        user.replace_all_uses_with(back, delete_user_cb=lambda each: each is not back)


def _dtype(node: Node) -> torch.dtype | None:
    value = node.meta.get("example_value")
    return value.dtype if isinstance(value, Tensor) else None
