"""Output head and cross entropy in chunks of tokens, exact. Prior art: Liger's fused linear loss.

With z = h W^T + b, l = f(z) (a cast, soft-capping) and y the targets, the loss and its gradients

    L = sum_i -log softmax(l_i)[y_i] / count,    dh = dz W,    dW = dz^T h,    db = sum dz

are sums over tokens i: forward computes them chunk by chunk, so that neither the logits nor their
gradient ever exist whole, and backward only scales dh, dW, db.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import GraphModule
from torch.nn import functional

from surgery.passkit import (
    CaptureError,
    Method,
    Saved,
    check_types,
    chunk_head,
    demand,
    find_head,
    register,
)


@register("chunked_loss")
@dataclass(frozen=True, kw_only=True)
class ChunkedLoss:
    """Options of chunked_loss.

    keep_logits: return the logits all the same, without gradients; else the output carries
    `logits=None` while gradients are on. tokens: of a chunk (default: 24 MiB of logits).
    """

    saves = ("activations",)

    keep_logits: bool = False
    tokens: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        enough = self.tokens is None or self.tokens >= 1
        demand(enough, self, f"tokens={self.tokens} of a chunk must be at least 1.")

    def start(self, model: nn.Module) -> Chunking:
        """Return the state of the pass on a model; changes nothing."""
        return Chunking(options=self, model=type(model).__name__)


@dataclass(eq=False, kw_only=True)
class Chunking(Method):
    options: ChunkedLoss
    model: str
    name: str = "chunked_loss"
    compiles = True
    losses: int = 0
    reasons: list[str] = field(default_factory=list)  # why a cross entropy was left alone

    def rewrite(self, graph: GraphModule, inputs: Sequence[Any], saved: Saved) -> None:
        for loss in graph.graph.find_nodes(op="call_function", target=functional.cross_entropy):
            found = find_head(loss, self.options.keep_logits)
            if isinstance(found, str):
                self.reasons.append(found)
                continue
            how = (self.options.tokens, self.options.keep_logits)
            chunk_head(graph, loss, found, f"chunked_loss_{self.losses}", *how)
            self.losses += 1

    def check_reached(self) -> None:
        if not self.losses:
            why = "; ".join(self.reasons) or "no cross entropy is computed in it"
            raise CaptureError(
                f"chunked_loss has nothing to do in the forward of {self.model}: {why}. Let the "
                "model compute the loss, model(**inputs, labels=labels).loss, or leave "
                "chunked_loss out."
            )

    def lines(self) -> Iterable[tuple[str, str]]:
        yield "chunked losses", f"{self.losses}"
