"""Exact recomputation of cheap operations. Prior art: torch.compile's min-cut partitioner.

A Linear y = x W^T keeps x for dW = g^T x, and a norm, an activation or a product keeps its inputs.
Where x is cheap to compute from tensors that are kept anyway, it is not kept but computed again in
backward: in a Llama block the residual stream, q, k, v, the attention's result, gate and up remain,
in bf16 8D + 4K + 4F + 4H + 8 bytes a token instead of 20D + 4K + 8F + 4H + 8 (D hidden, K keys, F
feed-forward, H heads). No matrix product and no attention is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from surgery.passkit import (
    EVERY,
    SIMPLE,
    Finder,
    Method,
    Saved,
    copied,
    cut_out,
    fuse,
    is_cheap,
    name_of,
    register,
    writes,
)

CHEAP = SIMPLE | {"contiguous", "dropout", "flatten", "normalize", "reshape", "var", "view"}


@register("recompute")
@dataclass(frozen=True, kw_only=True)
class Recompute:
    """Has no options. Exact: the loss equals eager's bit for bit, gradients up to rounding."""

    saves = ("activations",)

    def start(self, model: nn.Module) -> Recomputation:
        """Return the state of the pass on a model; changes nothing."""
        return Recomputation()


@dataclass(eq=False, kw_only=True)
class Recomputation(Method):
    name: str = "recompute"
    after = (EVERY,)  # works on what autograd would keep of what the others have made
    compiles = True
    fuses = staticmethod(fuse)
    regions: int = 0  # of all captured graphs

    def rewrite(self, graph: GraphModule, inputs: Sequence[Any], saved: Saved) -> None:
        """Cut the regions out of one captured graph, checkpointed bodies included, in place."""
        for _, inner in saved.inner():
            self.rewrite(inner.module, inner.inputs, inner)
            inner.module.recompile()
        if _drop_copies(graph, saved):
            saved = Saved(graph, saved.inputs, saved.mode)
        finder = Finder(graph, saved, _is_cheap)
        for i, region in enumerate(finder.find()):
            cut_out(graph, region, f"region_{i}", after=finder.order[finder.start(region) - 1])
            self.regions += 1

    def lines(self) -> Iterable[tuple[str, str]]:
        yield "recomputed regions", f"{self.regions}" if self.regions else "none captured yet"


def _is_cheap(node: Node) -> bool:
    return name_of(node) in CHEAP or is_cheap(node)


def _drop_copies(graph: GraphModule, saved: Saved) -> bool:
    """Read keys and values from a fused projection that is kept anyway, not from copies of them."""
    if any(writes(node) for node in graph.graph.nodes):
        return False
    kept = {storage for storages in saved.saves.values() for storage in storages}
    dropped = False
    for node in graph.graph.find_nodes(op="call_function", target=torch.cat):
        source = copied(node)
        if source is not None and saved.outputs[source] <= kept:
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
            dropped = True
    return dropped
