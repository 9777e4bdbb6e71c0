"""Operations whose saved tensors are kept in another form.

An operation is run under autograd inside of an autograd Function, with hooks on what it saves.
Once it has run, each tensor that it saved is kept as it is, or packed; all of it goes through
`ctx.save_for_backward`, so that checkpointing and offloading around it still see what is kept.
Nothing is computed twice: backward goes through the operation's own graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.fx import GraphModule

from surgery.compat.autograd import first_order_only
from surgery.compat.tensors import flatten, is_fake, storage_of, unflatten
from surgery.kernels.bits import Form, Packed, fills, mask, quantise, unpack


@dataclass(frozen=True, kw_only=True)
class Packer:
    """How one operation's saved tensors are packed; `body.meta["packer"]`.

    bits: the size of a packed entry of an activation. random: a function of the device that returns
    uniform numbers in [0, 1) for the rows and columns, see `quantise`; never called in a dry run.
    sign: whether backward reads only the sign of the operation's result. mask: whether the tensor
    that the operation makes for itself is a mask. smallest: the bytes from which a mask is packed.
    """

    bits: int
    random: Callable[[torch.device], tuple[Tensor, Tensor]]
    sign: bool = False
    mask: bool = False
    smallest: int = 256

    def shared(self, x: Tensor) -> Packed:
        """Pack an activation that several operations may save."""
        if is_fake(x):
            rows = columns = x.new_zeros(1, dtype=torch.float32)
        else:
            rows, columns = self.random(x.device)
        return quantise(x, self.bits, rows, columns)

    def inner(self, x: Tensor) -> Packed | None:
        """Pack a tensor that the operation made for itself; None leaves it unpacked."""
        is_mask = x.dtype == torch.bool or self.mask
        return mask(x) if is_mask and x.numel() >= self.smallest else None


@dataclass(eq=False)
class Shared:
    """An activation, packed when an operation keeps it for the first time."""

    x: Tensor | None
    packed: Packed | None = None

    def pack(self, packer: Packer) -> Packed:
        if self.packed is None:
            assert self.x is not None
            self.packed = packer.shared(self.x)
        return self.packed

    def covers(self, t: Tensor) -> bool:
        """Whether t is the same entries, perhaps in another shape."""
        x = self.x
        if x is None or storage_of(t) != storage_of(x):
            return False
        same = (t.shape, t.stride(), t.storage_offset()) == (
            x.shape,
            x.stride(),
            x.storage_offset(),
        )
        return same or (fills(x) and fills(t))


def share(x: Tensor) -> Shared:
    """Return what stands for x where it is kept; nothing is packed yet."""
    return Shared(x.detach())


def held(body: GraphModule, count: int, *given: Any) -> tuple[Any, Shared]:
    """Run an operation, `body`, and keep what it saves in packed form.

    given: `count` values made by `share`, then the inputs of the body. Returns its result, and the
    result as something to share.
    """
    own = Shared(None)
    flat = _Held.apply(body, given[:count], own, *given[count:])
    result = unflatten(list(flat), body.meta["result"])
    return result, own


@dataclass(eq=False)
class _Store:
    """Between the hooks of one operation and its backward; holds tensors during backward only."""

    forms: list[tuple[Form | None, int, int]] = field(default_factory=list)
    tensors: Sequence[Tensor] = ()

    def read(self, index: int) -> Tensor:
        form, start, count = self.forms[index]
        if form is None:
            return self.tensors[start]
        return unpack(form, self.tensors[start : start + count])


class _Open(torch.autograd.Function):
    """x as the result of a node that holds nothing: a leaf would keep x itself alive."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


class _Held(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, body: GraphModule, shared: tuple[Shared, ...], own: Shared, *inputs: Any
    ) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[3:]
        store, saved = _Store(), []

        def pack(t: Tensor) -> int:
            saved.append(t.detach())
            return len(saved) - 1

        with torch.enable_grad():
            handle = torch.empty(0, requires_grad=True)
            opened = [
                _Open.apply(handle, x) if need else x
                for x, need in zip(inputs, needed, strict=True)
            ]
            with saved_tensors_hooks(pack, store.read):
                result = body.forward(*opened)  # hooks on all modules are not meant
        flat, body.meta["result"] = flatten(result)
        first = next((t for t in flat if isinstance(t, Tensor)), None)
        own.x = None if first is None else first.detach()
        kept: list[Tensor] = []
        places: dict[int, int] = {}
        for t in saved:
            packed = _packed(t, shared, own, body.meta["packer"])
            form, tensors = (None, (t,)) if packed is None else packed
            start = places.setdefault(id(tensors[0]), len(kept))
            if start == len(kept):
                kept += tensors
            store.forms.append((form, start, len(tensors)))
        saved.clear()
        ctx.store = store
        ctx.inputs = [
            get_gradient_edge(x) if n else None for x, n in zip(opened, needed, strict=True)
        ]
        ctx.outputs = [
            get_gradient_edge(t) if isinstance(t, Tensor) and t.requires_grad else None
            for t in flat
        ]
        ctx.save_for_backward(*kept)
        outputs = [t.detach() if isinstance(t, Tensor) else t for t in flat]
        fixed = [
            t
            for t, edge in zip(outputs, ctx.outputs, strict=True)
            if edge is None and isinstance(t, Tensor)
        ]
        ctx.mark_non_differentiable(*fixed)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        first_order_only("compress")
        pairs = [
            (edge, grad)
            for edge, grad in zip(ctx.outputs, grads, strict=True)
            if edge is not None and grad is not None
        ]
        wanted: list[GradientEdge] = [edge for edge in ctx.inputs if edge is not None]
        ctx.store.tensors = ctx.saved_tensors
        try:
            found = iter(
                torch.autograd.grad(
                    [edge for edge, _ in pairs],
                    wanted,
                    [grad for _, grad in pairs],
                    allow_unused=True,
                    retain_graph=True,  # it holds nothing; the outer graph decides
                )
            )
        finally:
            ctx.store.tensors = ()
        return None, None, None, *(next(found) if edge is not None else None for edge in ctx.inputs)


def _packed(t: Tensor, shared: Sequence[Shared], own: Shared, packer: Packer) -> Packed | None:
    for one in shared:
        if one.covers(t):
            return _as(one.pack(packer), t)
    if own.covers(t):
        return mask(t) if packer.sign else _as(own.pack(packer), t)
    return packer.inner(t)


def _as(packed: Packed, t: Tensor) -> Packed:
    """The same kept tensors, to be read in the shape of t."""
    form = packed.form
    stride = t.stride() if fills(t) else form.stride
    return Packed(Form(form.bits, tuple(t.shape), stride, form.dtype), packed.tensors)
