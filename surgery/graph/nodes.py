"""What the engine puts into captured graphs.

One captured graph may serve many layers (under gradient checkpointing, after a graph break), so a
node never carries a name from capture time: it finds its site by the identity of the tensor that it
is given. What changes while training is plain Python state, which Dynamo's guards never see.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import checkpoint

from surgery.compat.autograd import hooks_alone
from surgery.compat.dynamo import policy_of
from surgery.errors import ModelError
from surgery.weights.indices import Block, block_of
from surgery.weights.sites import site_of

F = TypeVar("F", bound=Callable[..., Any])


def by_identity(run: F) -> F:
    """Mark a node that finds something by the identity of a tensor that it is given.

    It must get that very object: no pass may put it into a graph of its own.
    """
    run.by_identity = True  # pyright: ignore[reportFunctionMemberAccess]
    return run


def is_by_identity(node: Node) -> bool:
    """Whether a node recognises a tensor that it is given by identity."""
    return bool(getattr(node.target, "by_identity", False))


@by_identity
def gate(weight: Tensor) -> Tensor:
    """Return the weight as the graph shall read it now.

    A weight that is trained itself: itself. One that is not being trained: detached, so that
    autograd saves nothing for it. One trained in copies: attached to its active copies (one that
    FSDP2 has cut: itself, the copies get their gradients when it has been reduced). One with a
    mapped coordinate: itself, since the pass's own node, which reads it next, knows it by identity.
    """
    site = site_of(weight)
    if site is None or site.mapped:
        return weight
    site.was_read(weight)
    active = [each for each in site.coordinates if each.active]
    if not active:
        return weight.detach()
    if site.whole or active[0].twin is not None:  # FSDP2 adds up gradients of weights
        return weight
    indices = tuple(each.index for each in active)
    return _Copies.apply(weight.detach(), weakref.ref(weight), indices, *(c.read for c in active))


@by_identity
def written(weight: Tensor) -> Tensor:
    """Return a weight that the graph changes in place; ModelError if copies of it are trained."""
    site = site_of(weight)
    if site is not None and site.copied:
        raise ModelError(
            f"{site.name} is changed in each forward (by nn.Embedding(max_norm=...), or a "
            "constraint), but the pass trains copies of it, in float32 or of parts, which would "
            "miss the change. Leave it out of targets= or always=, or change it after each step "
            "instead, under torch.no_grad()."
        )
    return weight


class _Copies(torch.autograd.Function):
    """The identity on a weight whose gradient goes to copies of parts of it."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        own: Callable[[], Tensor | None],
        indices: tuple[Block | None, ...],
        *copies: Tensor,
    ) -> Tensor:
        ctx.given = [(i, c.dtype) for i, c in zip(indices, copies, strict=True)]
        ctx.own, ctx.copies = own, [weakref.ref(c) for c in copies]
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        own = ctx.own()
        copies = [c for ref in ctx.copies if (c := ref()) is not None]
        for hook in hooks_alone(own, copies) if own is not None else ():  # as if it had reached it
            changed = hook(grad)
            grad = grad if changed is None else changed
        # Copied: a view would keep the gradient of the whole weight alive in `.grad`.
        parts = [
            grad.to(dtype) if index is None else block_of(grad, index).to(dtype, copy=True)
            for index, dtype in ctx.given
        ]
        return None, None, None, *parts


def anchor(coordinate: Tensor, value: Any) -> Any:
    """Return a floating tensor as one that requires a gradient, which then comes to nobody."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return _Anchor.apply(value, coordinate)


class _Anchor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, coordinate: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


@by_identity
def checkpointed(body: GraphModule, *inputs: Any, **options: Any) -> Any:
    """Run a captured checkpoint region as eager does: recomputed in backward, same dropout masks.

    Dynamo's own operator, run outside of a compiler, dispatches every operation through a mode and
    does not restore the generator: with dropout its gradients would be wrong.
    """
    known = {name: options[name] for name in ("preserve_rng_state",) if name in options}
    policy = policy_of(body)
    if policy is not None:
        known["context_fn"] = policy
    return checkpoint(body.forward, *inputs, use_reentrant=False, **known)
