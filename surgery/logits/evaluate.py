"""Computing expressions over logits in chunks of rows, forward and backward.

A sum over all rows, L = sum_i f_i(z_i), has its gradients computed in forward, chunk by chunk; they
wait for backward, which only scales them. One result a row, y_i = f_i(z_i), has its gradients

    dz_i = g_i f_i'(z_i),    dh = dz W,    dW = dz^T h,    db = sum dz

computed in backward, from logits that are computed again, unless nothing but h is trained: then
dy_i/dh_i waits from forward on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from surgery.compat.autograd import first_order_only
from surgery.logits.expression import (
    Expression,
    Head,
    Leaf,
    Rows,
    cast_to,
    detached,
    hollow,
    leaves_of,
    logits,
    mapped,
    value_of,
)
from surgery.logits.sums import Sums, scaled, tokens_of
from surgery.weights.matrices import wide


@dataclass(frozen=True, eq=False, kw_only=True)
class Program:
    """An expression to be computed. rows: of it. tokens: rows of a chunk."""

    root: Expression
    rows: int
    tokens: int

    @cached_property
    def leaves(self) -> list[tuple[Leaf, slice]]:
        """The leaves, and where their tensors stand among all."""
        found, start = [], 0
        for leaf in leaves_of(self.root):
            found.append((leaf, slice(start, start + len(leaf.tensors))))
            start += len(leaf.tensors)
        return found

    @property
    def tensors(self) -> list[Tensor | None]:
        """The tensors of all leaves; those with rows as (rows, X)."""
        found: list[Tensor | None] = []
        for leaf, _ in self.leaves:
            first, *rest = leaf.tensors
            assert first is not None
            if isinstance(leaf, Head | Rows):
                first = first.reshape(self.rows, first.shape[-1])
            found += [first, *rest]
        return found

    def alone(self) -> Program:
        """Return the program without tensors: what is kept for backward is autograd's to keep."""
        return replace(self, root=mapped(self.root, hollow))

    def only_hidden(self, needs: Sequence[bool]) -> bool:
        """Whether nothing but hidden states is to be differentiated by."""
        heads = {where.start for leaf, where in self.leaves if isinstance(leaf, Head)}
        return all(place in heads for place, need in enumerate(needs) if need)

    def parts(self) -> list[slice]:
        """The chunks; of no rows, one that is empty."""
        starts = range(0, max(1, self.rows), self.tokens)
        return [slice(start, min(start + self.tokens, self.rows)) for start in starts]

    def ready(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return tensors in which weights have the dtype that their head computes in."""
        found = list(tensors)
        for leaf, where in self.leaves:
            if isinstance(leaf, Head):
                hidden, *weights = tensors[where]
                found[where] = [hidden, *cast_to(leaf, weights)]
        return found

    def chunk(
        self, tensors: Sequence[Tensor | None], part: slice, needs: Sequence[bool]
    ) -> tuple[Any, list[Tensor], list[int]]:
        """Return the value of some rows, and the inputs that it can be differentiated by: of which
        leaves. tensors: `ready`. needs: of which tensors a gradient is wanted."""
        known: dict[int, Tensor] = {}
        inputs: list[Tensor] = []
        places: list[int] = []
        for place, (leaf, where) in enumerate(self.leaves):
            first, *rest = tensors[where]
            assert first is not None
            if isinstance(leaf, Head):
                (hidden,) = cast_to(leaf, [first[part]])
                weight, bias = rest
                assert hidden is not None and weight is not None
                value = logits(leaf, hidden, weight, bias)
            else:
                value = (first[part] if isinstance(leaf, Rows) else first).detach()
            if any(needs[where]):
                inputs.append(value.requires_grad_())
                places.append(place)
            known[id(leaf)] = value
        with torch.set_grad_enabled(bool(inputs)):
            return value_of(self.root, known), inputs, places


def slopes_of(value: Tensor, inputs: Sequence[Tensor], slope: Tensor) -> Sequence[Tensor | None]:
    """Return gradients by inputs; None by those that a value does not go on from: comparisons."""
    if not value.requires_grad:
        return [None] * len(inputs)
    return torch.autograd.grad(value, inputs, slope, allow_unused=True)


class Gathered:
    """Gradients of the tensors of a program, gathered from chunks. given: the tensors themselves;
    ready: as heads compute with them."""

    def __init__(
        self,
        program: Program,
        given: Sequence[Tensor | None],
        ready: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> None:
        self.program, self.given = program, given
        self.heads: dict[int, Sums] = {}
        self.others: dict[int, Tensor] = {}
        for place, (leaf, where) in enumerate(program.leaves):
            first, *rest = ready[where]
            assert first is not None
            if isinstance(leaf, Head):
                weight, bias = rest
                assert weight is not None
                one = program.rows <= program.tokens
                self.heads[place] = Sums(first, weight, bias, needs[where], one=one)
            elif any(needs[where]):
                self.others[place] = torch.zeros_like(first)

    def add(self, part: slice, places: Sequence[int], slopes: Sequence[Tensor | None]) -> None:
        """Add the gradients of what `Program.chunk` returned."""
        for place, slope in zip(places, slopes, strict=True):
            if place in self.heads:
                self.heads[place].add(part, slope)
            elif slope is None:
                continue
            elif isinstance(self.program.leaves[place][0], Rows):
                self.others[place][part] = slope
            else:
                self.others[place] += slope

    def all(self) -> list[Tensor | None]:
        """Return the gradient of each tensor, in its dtype."""
        found: list[Tensor | None] = []
        for place, (leaf, _) in enumerate(self.program.leaves):
            mine = self.heads[place].all() if isinstance(leaf, Head) else [self.others.get(place)]
            found += mine
        pairs = zip(found, self.given, strict=True)
        return [g if g is None or t is None else g.to(t.dtype) for g, t in pairs]


class _EachRow(torch.autograd.Function):
    """One or a few results a row."""

    @staticmethod
    def forward(ctx: Any, program: Program, *tensors: Tensor | None) -> Tensor:
        ready, needs = program.ready(tensors), ctx.needs_input_grad[1:]
        ctx.program, ctx.waiting = program, None
        found: list[Tensor] = []
        waits = any(needs) and program.only_hidden(needs)
        ours = needs if waits else [False] * len(needs)
        gathered = Gathered(program, tensors, ready, ours)
        for part in program.parts():
            value, inputs, places = program.chunk(ready, part, ours)
            found.append(value.detach())
            waits = waits and value[0:1].numel() <= 1
            if waits:
                slopes = slopes_of(value, inputs, torch.ones_like(value))
                gathered.add(part, places, slopes)
            del value, inputs
        if waits:
            ctx.waiting = len(tensors)
            ctx.save_for_backward(*gathered.all())
        else:
            ctx.save_for_backward(*tensors)
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only("chunked_loss")
        (slope,), program = grads, ctx.program
        if ctx.waiting is not None:
            scale = slope.reshape(-1, 1)
            kept = ctx.saved_tensors
            return None, *(None if g is None else (g * scale).to(g.dtype) for g in kept)
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[1:]
        ready = program.ready(tensors)
        gathered = Gathered(program, tensors, ready, needs)
        for part in program.parts():
            value, inputs, places = program.chunk(ready, part, needs)
            slopes = slopes_of(value, inputs, slope[part])
            del value, inputs  # or they would live on while the next chunk is computed
            gathered.add(part, places, slopes)
        return None, *gathered.all()


class _Total(torch.autograd.Function):
    """The sum over all rows and all that each comes to, over a number."""

    @staticmethod
    def forward(ctx: Any, program: Program, over: int, *tensors: Tensor | None) -> Tensor:
        ready, needs = program.ready(tensors), ctx.needs_input_grad[2:]
        gathered = Gathered(program, tensors, ready, needs)
        total: Tensor | None = None
        for part in program.parts():
            value, inputs, places = program.chunk(ready, part, needs)
            one = value.detach().sum(dtype=wide(value))
            total = one if total is None else total + one
            dtype = value.dtype
            if inputs:
                slopes = slopes_of(value, inputs, torch.ones_like(value))
                del value, inputs
                gathered.add(part, places, slopes)
        assert total is not None
        ctx.over = over
        ctx.save_for_backward(*gathered.all())
        return (total / over).to(dtype)  # in this order: a sum is too large for float16

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only("chunked_loss")
        (scale,) = grads
        return None, None, *scaled(ctx.saved_tensors, scale.to(wide(scale)) / ctx.over)


def each_row(root: Expression, rows: int) -> Tensor:
    """Return what an expression of that many rows comes to: (rows, ...)."""
    if not torch.is_grad_enabled():
        return without_gradients(root, rows)
    program = program_of(root, rows)
    return announcing(_EachRow.apply(program.alone(), *program.tensors), root)


def total(root: Expression, rows: int, over: int = 1) -> Tensor:
    """Return the sum of all that an expression of that many rows comes to, over a number."""
    # What was written down with gradients may be asked for without: none are computed then.
    program = program_of(root if torch.is_grad_enabled() else detached(root), rows)
    return announcing(_Total.apply(program.alone(), over, *program.tensors), root)


def mean(root: Expression, rows: int, number: int) -> Tensor:
    """Return a mean; of nothing, it is nan and has no gradient, as torch's."""
    if number:
        return total(root, rows, number)
    summed = total(root, rows)
    return summed.masked_fill(torch.ones_like(summed, dtype=torch.bool), torch.nan)


def announcing(result: Tensor, root: Expression) -> Tensor:
    """Return what was computed of an expression, with the hooks of its heads."""
    if result.requires_grad:
        for leaf in leaves_of(root):
            for hook in leaf.before if isinstance(leaf, Head) else ():
                result.register_hook(hook)
    return result


def without_gradients(root: Expression, rows: int) -> Any:
    """Return what an expression comes to: a tensor (rows, ...), or a tuple of such."""
    with torch.no_grad():
        program = program_of(root, rows)
        ready = program.ready(program.tensors)
        needs = [False] * len(ready)
        found = [program.chunk(ready, part, needs)[0] for part in program.parts()]
    if isinstance(found[0], Tensor):
        return torch.cat(found)
    return tuple(torch.cat(each) for each in zip(*found, strict=True))


def program_of(root: Expression, rows: int) -> Program:
    """Return how an expression of that many rows is computed."""
    heads = [leaf for leaf in leaves_of(root) if isinstance(leaf, Head)]
    return Program(root=root, rows=rows, tokens=tokens_of(heads[0].weight, heads[0].tokens))
