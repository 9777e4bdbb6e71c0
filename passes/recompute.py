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
from torch.fx import GraphModule

from surgery.ledger import Ledger
from surgery.regions import Finder, cut_out, name_of
from surgery.registry import register
from surgery.simplify import copied, writes
from surgery.state import Method

# By name, as functions and as methods: pointwise operations, norms, casts, and changes of shape.
CHEAP = frozenset(
    ["add", "sub", "rsub", "mul", "truediv", "div", "neg", "pow", "square", "abs", "clamp"]
    + ["rsqrt", "sqrt", "reciprocal", "exp", "log", "sin", "cos", "erf", "mean", "var"]
    + ["sigmoid", "tanh", "relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish"]
    + ["hardswish", "softplus", "layer_norm", "rms_norm", "normalize", "dropout"]
    + ["to", "float", "half", "bfloat16", "type_as", "view", "reshape", "flatten", "contiguous"]
)


@register("recompute")
@dataclass(frozen=True, kw_only=True)
class Recompute:
    """Exact: no options. Gradients are eager's to rounding, the loss is bit-identical."""

    def start(self, model: nn.Module) -> Recomputation:
        """Return the state of the pass on a model; changes nothing."""
        return Recomputation()


@dataclass(eq=False, kw_only=True)
class Recomputation(Method):
    name: str = "recompute"
    order: int = 1
    fixed: bool = True
    regions: int = 0  # of all captured graphs

    def rewrite(self, graph: GraphModule, inputs: Sequence[Any], ledger: Ledger) -> None:
        """Cut the regions out of one captured graph, checkpointed bodies included, in place."""
        for _, inner in ledger.inner():
            self.rewrite(inner.module, inner.inputs, inner)
            inner.module.recompile()
        if _drop_copies(graph, ledger):
            ledger = Ledger(graph, ledger.inputs, ledger.mode)
        finder = Finder(graph, ledger, lambda node: name_of(node) in CHEAP)
        for i, region in enumerate(finder.find()):
            cut_out(graph, region, f"region_{i}", after=finder.order[finder.start(region) - 1])
            self.regions += 1

    def lines(self) -> Iterable[tuple[str, str]]:
        yield "recomputed regions", f"{self.regions}"


def _drop_copies(graph: GraphModule, ledger: Ledger) -> bool:
    """Read keys and values from a fused projection that is kept anyway, not from copies of them."""
    if any(writes(node) for node in graph.graph.nodes):
        return False
    kept = {storage for storages in ledger.saves.values() for storage in storages}
    dropped = False
    for node in graph.graph.find_nodes(op="call_function", target=torch.cat):
        source = copied(node)
        if source is not None and ledger.outputs[source] <= kept:
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
            dropped = True
    return dropped
