"""What passes put into captured graphs.

One captured graph may serve many layers (under gradient checkpointing, after a graph break), so a
node never carries a name from capture time: it finds its site by the identity of the tensor that it
is given. What changes while training is plain Python state, which Dynamo's guards never see.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from surgery.coordinates import Index, site_of


def gate(weight: Tensor) -> Tensor:
    """Return the weight as the graph shall read it now.

    A weight that is trained whole: itself. One that is not being trained: detached, so that
    autograd saves nothing for it. One trained in blocks: attached to its active blocks. One with a
    mapped coordinate: itself, since the pass's own node, which reads it next, knows it by identity.
    """
    site = site_of(weight)
    if site is None or site.map is not None:
        return weight
    site.reached = True
    active = [piece for piece in site.pieces if piece.active]
    if not active:
        return weight.detach()
    if site.whole:
        return weight
    indices = tuple(piece.index for piece in active)
    return _Blocks.apply(weight.detach(), indices, *(piece.parameter for piece in active))


class _Blocks(torch.autograd.Function):
    """The identity on a weight whose gradient goes to blocks that view parts of it."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, indices: tuple[Index, ...], *blocks: Tensor) -> Tensor:
        ctx.indices = indices
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        # Cloned: a view would keep the gradient of the whole weight alive in `.grad`.
        return None, None, *(grad[index].clone() for index in ctx.indices)


def checkpointed(body: GraphModule, *inputs: Any, **options: Any) -> Any:
    """Run a captured checkpoint region as eager does: recomputed in backward, same dropout masks.

    Dynamo's own operator, run outside of a compiler, dispatches every operation through a mode and
    does not restore the generator: with dropout its gradients would be wrong.
    """
    known = {name: options[name] for name in ("preserve_rng_state",) if name in options}
    if "_checkpoint_context_fn" in body.meta:
        known["context_fn"] = body.meta["_checkpoint_context_fn"]
    return checkpoint(body, *inputs, use_reentrant=False, **known)
