"""Exact losses whose logits never exist as a whole. Prior art: Liger's fused linear losses.

With z = h W^T + b, a function of each row of the logits, y_i = f_i(z_i), has the gradients

    dz_i = g_i f_i'(z_i),    dh = dz W,    dW = dz^T h,    db = sum dz

which are sums over rows: forward and backward take a chunk of rows at a time, so that neither the
logits nor their gradient ever exist as a whole. The model's logits are a tensor that holds h and W.
What torch's functions do with it, in the model or in the loop, is recorded, and computed only when
a small result is needed: a loss, log-probabilities, an entropy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import GraphModule

from surgery.passkit import (
    CaptureError,
    Inner,
    Method,
    Saved,
    check_types,
    chunks_its_head,
    cut_head,
    demand,
    find_heads,
    inner_of,
    register,
)


@register("chunked_loss")
@dataclass(frozen=True, kw_only=True)
class ChunkedLoss:
    """Options of chunked_loss.

    outside: whether logits that leave the model are computed in chunks too, for a loss in your own
    loop; they are then a tensor that torch's functions take. If False, the logits are `None` beside
    a loss of the model, and plain logits without one. keep_logits: whether to return the logits
    beside the model's loss, computed and without gradients. tokens: the number of rows in a chunk
    (default: as many as give 24 MiB of logits, and at least a quarter of the width, but not more
    than 256 for that; 1,024 or more on a GPU).
    """

    saves = ("activations",)

    outside: bool = True
    keep_logits: bool = False
    tokens: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        enough = self.tokens is None or self.tokens >= 1
        demand(enough, self, f"tokens={self.tokens} of a chunk must be at least 1.")

    def start(self, model: nn.Module) -> Chunking:
        """Return the state of the pass on a model; changes nothing."""
        own = type(model).__name__
        theirs = chunks_its_head(model)
        return Chunking(options=self, model=own, theirs=theirs, inner=inner_of(model))


@dataclass(eq=False, kw_only=True)
class Chunking(Method):
    options: ChunkedLoss
    model: str
    inner: Inner  # of the model's blocks
    name: str = "chunked_loss"
    compiles = True
    theirs: str | None = None  # who computes the head in chunks already
    heads: int = 0
    losses: int = 0
    reasons: list[str] = field(default_factory=list)  # why the logits of a loss were left alone

    def rewrite(self, graph: GraphModule, inputs: Sequence[Any], saved: Saved) -> None:
        own = self.options
        found, reasons = find_heads(graph, own.outside, self.inner)
        for logits in found:
            leave = "factored" if own.outside else "none"
            if own.keep_logits and logits.losses:
                leave = "kept"
            name = f"chunked_loss_{self.heads}"
            reason = cut_head(graph, logits, name, leave, own.tokens)
            if reason:
                reasons.append(reason)
                continue
            self.heads, self.losses = self.heads + 1, self.losses + logits.losses
        self.reasons += reasons

    def check_reached(self) -> None:
        if not self.heads and not self.theirs:
            why = "; ".join(self.reasons) or "no cross entropy is computed in it"
            if self.options.outside:
                why += ", and no Linear's logits, wider than their hidden states, leave it"
            raise CaptureError(
                f"chunked_loss has nothing to do in the forward of {self.model}: {why}. Let the "
                "model compute the loss, model(**inputs, labels=labels).loss, or leave "
                "chunked_loss out."
            )

    def lines(self) -> Iterable[tuple[str, str]]:
        yield "heads in chunks of rows", f"{self.heads}; losses inside the model: {self.losses}"
        if self.theirs:
            yield "head and loss", f"{self.theirs} computes them in chunks of its own"
