"""What is left of cheap operations, run as few kernels: rotary embeddings, residual sums, masks.

On an accelerator an operation costs the traffic of its operands, and a chain of them as one kernel
that of the first and the last. Regions that save memory have been cut out before; the groups here
save time only: autograd keeps for one what its compiled backward reads.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from surgery.activations.regions import Finder, Region, escaping, own_graph, replace, sources
from surgery.compat.autograd import first_order_only
from surgery.graph.reading import SIMPLE, is_random, name_of, writes
from surgery.graph.saved import Saved
from surgery.kernels import fused

COMPUTES = SIMPLE | {"cat", "softmax", "log_softmax", "cross_entropy"}
VIEWS = frozenset(
    ["getitem", "unsqueeze", "squeeze", "transpose", "permute", "expand"]
    + ["view", "reshape", "flatten", "contiguous"]
)


def fused_operations(body: GraphModule, *inputs: Any) -> tuple[Tensor, ...]:
    """Run a group of cheap operations as one compiled function, and so its backward."""
    if not fused.takes(body, inputs):
        return body.forward(*inputs)  # no call of a module: hooks on all modules are not meant
    return _Fused.apply(body, *inputs)


class _Fused(torch.autograd.Function):
    """Keeps the inputs that the gradients of a group depend on, and nothing else."""

    @staticmethod
    def forward(ctx: Any, body: GraphModule, *inputs: Any) -> tuple[Tensor, ...]:
        ctx.body, needed = body, ctx.needs_input_grad[1:]
        ctx.wanted = [place for place, need in enumerate(needed) if need]
        if ctx.wanted:
            kept = fused.reads(body, inputs, ctx.wanted)
            ctx.save_for_backward(*(inputs[place] for place in sorted(kept)))
            ctx.plain = [None if i in kept else _form(v) for i, v in enumerate(inputs)]
            ctx.kept = sorted(kept)
        return fused.run(body, inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only("recompute")
        inputs = [form() if callable(form) else form for form in ctx.plain]
        for place, value in zip(ctx.kept, ctx.saved_tensors, strict=True):
            inputs[place] = value
        return None, *fused.gradients(ctx.body, inputs, ctx.wanted, grads)


def _form(value: Any) -> Any:
    """Return what makes a tensor like this one, whose entries no one reads."""
    if not isinstance(value, Tensor):
        return value
    how = {"dtype": value.dtype, "device": value.device}
    return partial(torch.empty_strided, value.shape, value.stride(), **how)


def fuse(graph: GraphModule, saved: Saved) -> int:
    """Fuse each group of cheap operations in a graph into one node, checkpointed bodies included.

    saved: what autograd saves in the graph as it is now. Returns the number of groups.
    """
    found = 0
    for _, inner in saved.inner():
        found += fuse(inner.module, inner)
        inner.module.recompile()
    finder = Finder(graph, saved, partial(_fusable, saved))
    scopes: dict[int, Node] = {}  # the first node of each
    for node in finder.order:
        scopes.setdefault(finder.scope[node], node)
    regions = [Region(members=members) for members in _groups(finder)]
    for region in [each for each in regions if _keeps_no_more(finder, each)]:
        members = region.members
        # As the graph stands: other groups have been replaced.
        start = max([scopes[finder.scope[min(members)]], *sources(region)])
        if all(user > start for n in members for user in n.users if user not in members):
            read, results = sources(region), escaping(region)
            body = own_graph(read, sorted(members), results)
            name = f"fused_{found}"
            replace(graph, region, name, body, fused_operations, read, results, start)
            found += 1
    return found


def _fusable(saved: Saved, node: Node) -> bool:
    if name_of(node) not in COMPUTES | VIEWS or is_random(node) or writes(node):
        return False
    value, sources = saved.env.get(node), [saved.env.get(n) for n in node.all_input_nodes]
    tensors = [v for v in (value, *sources) if isinstance(v, Tensor)]
    same = len(tensors) == 1 + len(sources) and len({t.device for t in tensors}) == 1
    return same and tensors[0].is_floating_point()


def _groups(finder: Finder) -> list[set[Node]]:
    """Return groups of operations that read each other's results, of two computations at least."""
    group: dict[Node, set[Node]] = {}
    for node in finder.order:
        if node not in finder.cheap:
            continue
        grown = {node}
        for source in node.all_input_nodes:
            near = group.get(source, set())
            same = near and finder.scope[source] == finder.scope[node]
            if same and finder.convex(Region(members=grown | near)):
                grown |= near
        for member in grown:
            group[member] = grown
    found = {id(members): members for members in group.values()}
    trimmed = [_trimmed(members) for members in found.values()]
    large = [members for members in trimmed if sum(not _is_view(n) for n in members) > 1]
    return [members for members in large if finder.convex(Region(members=members))]


def _keeps_no_more(finder: Finder, region: Region) -> bool:
    """Whether what a group's gradients read takes no more than what its operations keep."""
    saved, members, read = finder.saved, region.members, sources(region)
    values = [saved.env.get(node) for node in read]
    wanted = [i for i, v in enumerate(values) if isinstance(v, Tensor) and v.requires_grad]
    if not wanted:
        return True
    body = own_graph(read, sorted(members), escaping(region))
    kept = fused.reads(body, values, wanted)
    after = {s for place in kept for s in saved.outputs[read[place]]} - saved.free
    before = {s for s, savers in finder.savers.items() if savers & members}
    others = {s for s, savers in finder.savers.items() if savers - members}
    return saved.bytes(after - others) <= saved.bytes(before - others)


def _trimmed(members: set[Node]) -> set[Node]:
    """Leave out views that are read outside: a compiler would return them by a detour."""
    for node in sorted(members, reverse=True):
        if _is_view(node) and not members >= set(node.users):
            members = members - {node}
    return members


def _is_view(node: Node) -> bool:
    return name_of(node) in VIEWS
