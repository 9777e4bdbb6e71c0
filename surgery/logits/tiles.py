"""Gradients of log-probabilities and normalizers of each row, in tiles of the logits.

With z = h W^T + b, logits l = f(z) (operations by numbers) and k classes y of each row,

    p_ik = l_i[y_ik],    n_i = log sum_v exp l_iv,    log softmax(l_i)[y_ik] = p_ik - n_i

    dl_iv = dn_i exp(l_iv - n_i) + sum_k [y_ik = v] dp_ik,    dz = f'(z) dl

    dh = dz W,    dW = dz^T h,    db = sum dz

Forward computes them as everything else is: an entry is that of the logits to the last bit. dn and
dp are known in backward only, where z is computed a second time: four products instead of three. A
tile is a band of rows by some of the classes. These products are of thousands of rows, and an entry
of dW is written once for a band, where a chunk of few rows by all classes adds to all of dW.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional

from surgery.compat.autograd import first_order_only
from surgery.kernels.autocast import Cast
from surgery.kernels.fused import launch, shared
from surgery.kernels.loss import gradient_of, normalizer, slopes
from surgery.kernels.plan import plan_of
from surgery.logits.evaluate import Program, announcing, program_of
from surgery.logits.expression import Expression, Head, Op
from surgery.logits.sums import add_product
from surgery.weights.matrices import wide

_BAND = 4096  # rows: products of more are no faster


def each_row_in_tiles(
    root: Op, inner: Expression, body: GraphModule, places: Tensor, used: Tensor | None = None
) -> Tensor:
    """Return what an expression of many rows comes to: of logits `inner`, which are body(z) of one
    head, log softmax(inner)[places] (rows, k), or log sum exp where k = 0.

    places (rows, k). used (rows,): the expression is a loss, n - p, and 0 in all other rows.
    """
    with_normalizer = Op(name="with_normalizer", function=_with_normalizer, args=(root, inner),
                         kwargs={}, cast=root.cast)  # fmt: skip
    program = program_of(with_normalizer, len(places))
    how = _How(program=program.alone(), body=shared(body))
    value, _ = _InTiles.apply(how, places, used, *program.tensors)
    return announcing(value, root)


def _with_normalizer(value: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return a value beside log sum exp of its logits (rows, 1), in float32 at least."""
    sizes = plan_of(logits.device)
    # As many rows at a time as stay in the cache: it takes three copies of them.
    rows = len(logits) if sizes.whole else max(1, sizes.tile // (4 * logits.shape[-1]))
    parts = [launch(normalizer, part, static=True) for part in logits.split(max(1, rows))]
    return value, torch.cat(parts)


@dataclass(frozen=True, eq=False, kw_only=True)
class _How:
    program: Program
    body: GraphModule

    @property
    def head(self) -> tuple[Head, slice]:
        """The only head, and where its tensors stand among all."""
        ((head, where),) = [each for each in self.program.leaves if isinstance(each[0], Head)]
        return head, where  # pyright: ignore[reportReturnType]

    def tiles(self, hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, list[slice]]]:
        """Return bands of rows, and the tiles of each by their classes."""
        asked, classes = self.head[0].tokens, len(weight)
        entries = asked * classes if asked else plan_of(weight.device).tile // 4
        for start in range(0, max(1, len(hidden)), _BAND):  # of no rows: one that is empty
            band = slice(start, min(start + _BAND, len(hidden)))
            width = max(1, entries // max(1, band.stop - start))
            yield band, [slice(c, min(c + width, classes)) for c in range(0, classes, width)]


class _InTiles(torch.autograd.Function):
    """What an expression comes to, and the normalizers."""

    @staticmethod
    def forward(
        ctx: Any, how: _How, places: Tensor, used: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.how, program = how, how.program
        ready, none = program.ready(tensors), [False] * len(tensors)
        found = [program.chunk(ready, part, none)[0] for part in program.parts()]
        value, total = (torch.cat(each) for each in zip(*found, strict=True))
        ctx.save_for_backward(*tensors[how.head[1]], places, used, total)
        ctx.mark_non_differentiable(total)
        ctx.count = len(tensors)
        return value, total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only("chunked_loss")
        how = ctx.how
        hidden, weight, bias, places, used, total = ctx.saved_tensors
        head, where = how.head
        slope = grads[0].reshape(len(places), max(1, places.shape[1])).to(total.dtype)
        if used is not None:
            slope = torch.where(used[:, None], -slope, 0.0)
        d_picked = slope if places.shape[1] else slope.new_zeros(places.shape)
        d_total = -slope.sum(1, keepdim=True) if places.shape[1] else slope
        needs = ctx.needs_input_grad[3:][where]
        given = (hidden, weight, bias)
        found = _gradients(how, head, given, needs, places, (total, d_total, d_picked))
        result: list[Tensor | None] = [None] * ctx.count
        result[where] = found
        return None, None, None, *result


def _gradients(
    how: _How,
    head: Head,
    given: tuple[Tensor, Tensor, Tensor | None],
    needs: tuple[bool, ...],
    places: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
) -> list[Tensor | None]:
    """Return the gradients of hidden states, weight and bias. rows: n, dn and dp."""
    hidden, weight, bias = given
    dtype, pull = head.dtype or hidden.dtype, gradient_of(how.body)
    assert pull is not None
    hidden = hidden.reshape(len(places), hidden.shape[-1])
    d_hidden = torch.empty_like(hidden) if needs[0] else None
    summed = weight.dtype if len(hidden) <= _BAND else wide(weight)
    d_weight = torch.empty_like(weight, dtype=summed) if needs[1] else None
    d_bias = torch.zeros_like(bias, dtype=wide(bias)) if bias is not None and needs[2] else None
    with Cast(hidden.device.type, None).again():
        for band, tiles in how.tiles(hidden, weight):
            h, own = hidden[band].to(dtype), [each[band] for each in rows]
            d_h = torch.zeros_like(h, dtype=wide(h))
            for tile in tiles:
                w = weight[tile].to(dtype)
                z = functional.linear(h, w, None if bias is None else bias[tile].to(dtype))
                at = places[band] - tile.start
                launch(slopes, z, own[0], own[1], at, own[2], how.body, pull, static=True)
                if d_hidden is not None:
                    add_product(d_h, z, w)
                if d_weight is not None and band.start == 0:
                    _place_product(d_weight[tile], z.t(), h)
                elif d_weight is not None:
                    add_product(d_weight[tile], z.t(), h)
                if d_bias is not None:
                    d_bias[tile] += z.sum(0)
                del z, w
            if d_hidden is not None:
                d_hidden[band] = d_h
    found = (None if d_hidden is None else d_hidden.view(given[0].shape), d_weight, d_bias)
    pairs = zip(found, given, strict=True)
    return [g if g is None or t is None else g.to(t.dtype) for g, t in pairs]


def _place_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    """Let a tensor be a b."""
    if a.dtype == to.dtype:
        torch.mm(a, b, out=to)
    else:
        to.copy_(a @ b)
