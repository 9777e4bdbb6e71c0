"""Log-probabilities of some classes, and the normalizer of each row, in tiles of the logits.

With z = h W^T + b, logits l = f(z) (operations by numbers) and k classes y of each row,

    p_ik = l_i[y_ik],    n_i = log sum_v exp l_iv,    log softmax(l_i)[y_ik] = p_ik - n_i

    dl_iv = dn_i exp(l_iv - n_i) + sum_k [y_ik = v] dp_ik,    dz = f'(z) dl

    dh = dz W,    dW = dz^T h,    db = sum dz

A tile is a band of rows by some of the classes. dn and dp are known in backward only, where z is
computed a second time: four products instead of three. They take as long as three on whole logits:
they are products of thousands of rows, and an entry of dW is written once for a band, where a chunk
of 128 rows by all classes reads W, and adds to all of dW, for each 128 rows.
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
from surgery.kernels.loss import gradient_of, slopes, statistics
from surgery.kernels.plan import plan_of
from surgery.logits.expression import Head
from surgery.logits.sums import add_product
from surgery.weights.matrices import wide

_BAND = 4096  # rows: products of more are no faster


def log_probabilities(head: Head, body: GraphModule, classes: Tensor | None) -> Tensor:
    """Return log softmax(l)[classes] (rows, k) of l = body(h W^T + b), in float32 at least.

    classes (rows, k). None: log sum exp l (rows, 1).
    """
    hidden = head.hidden.reshape(-1, head.hidden.shape[-1])
    places = hidden.new_zeros((len(hidden), 0), dtype=torch.long) if classes is None else classes
    if plan_of(places.device).whole:  # a class that is none is an error here: a tile cannot tell
        head.weight.detach()[:, 0].gather(0, places.flatten())
    how = _How(body=shared(body), dtype=head.dtype or hidden.dtype, tokens=head.tokens)
    normalizer, picked = _Tiled.apply(how, hidden, head.weight, head.bias, places)
    return normalizer if classes is None else picked - normalizer


def entries(head: Head, body: GraphModule, classes: Tensor) -> Tensor:
    """Return one entry l[class] of each row of l = body(h W^T + b), (rows, 1): a product with one
    row of W. classes (rows, 1)."""
    hidden = head.hidden.reshape(-1, head.hidden.shape[-1])
    places, dtype = classes.squeeze(1), head.dtype or hidden.dtype
    with Cast(hidden.device.type, None).again():
        own = functional.embedding(places, head.weight).to(dtype)
        z = torch.bmm(hidden.to(dtype)[:, None, :], own[:, :, None]).squeeze(2)
        z = z if head.bias is None else z + head.bias[places].to(dtype)[:, None]
        return body.forward(z)


@dataclass(frozen=True, kw_only=True)
class _How:
    """dtype: of the products. tokens: whose logits a tile is as large as; None: by the device."""

    body: GraphModule
    dtype: torch.dtype
    tokens: int | None

    def tiles(self, hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, list[slice]]]:
        """Return bands of rows, and the tiles of each by their classes."""
        classes = len(weight)
        entries = self.tokens * classes if self.tokens else plan_of(weight.device).tile // 4
        for start in range(0, max(1, len(hidden)), _BAND):  # of no rows: one that is empty
            band = slice(start, min(start + _BAND, len(hidden)))
            width = max(1, entries // max(1, band.stop - start))
            yield band, [slice(c, min(c + width, classes)) for c in range(0, classes, width)]

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(hidden, weight, None if bias is None else bias.to(self.dtype))


class _Tiled(torch.autograd.Function):
    """n (rows, 1) and p (rows, k), in float32 at least."""

    @staticmethod
    def forward(
        ctx: Any, how: _How, hidden: Tensor, weight: Tensor, bias: Tensor | None, places: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.how = how
        normalizer = torch.empty((len(hidden), 1), dtype=wide(hidden), device=hidden.device)
        picked = torch.zeros(places.shape, dtype=wide(hidden), device=hidden.device)
        with Cast(hidden.device.type, None).again():
            for band, tiles in how.tiles(hidden, weight):
                h, totals = hidden[band].to(how.dtype), []
                for tile in tiles:
                    z = how.logits(h, weight[tile].to(how.dtype), _part(bias, tile))
                    given = (z, places[band] - tile.start, how.body)
                    total, entries = launch(statistics, *given, static=True)
                    totals.append(total)
                    picked[band] += entries
                    del z
                # All at once: added one by one, they would be rounded as often as there are tiles.
                normalizer[band] = torch.cat(totals, 1).logsumexp(-1, keepdim=True)
        ctx.save_for_backward(hidden, weight, bias, places, normalizer)
        return normalizer, picked

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only("chunked_loss")
        hidden, weight, bias, places, normalizer = ctx.saved_tensors
        d_normalizer, d_picked = grads
        how, needs = ctx.how, ctx.needs_input_grad[1:4]
        pull = gradient_of(how.body)
        assert pull is not None
        d_hidden = torch.empty_like(hidden) if needs[0] else None
        one = len(hidden) <= _BAND
        summed = weight.dtype if one else wide(weight)
        d_weight = torch.empty_like(weight, dtype=summed) if needs[1] else None
        d_bias = torch.zeros_like(bias, dtype=wide(bias)) if needs[2] else None
        with Cast(hidden.device.type, None).again():
            for band, tiles in how.tiles(hidden, weight):
                h = hidden[band].to(how.dtype)
                d_h = torch.zeros_like(h, dtype=wide(h))
                for tile in tiles:
                    w = weight[tile].to(how.dtype)
                    z = how.logits(h, w, _part(bias, tile))
                    given = (normalizer[band], d_normalizer[band], places[band] - tile.start)
                    launch(slopes, z, *given, d_picked[band], how.body, pull, static=True)
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
        found = (d_hidden, d_weight, d_bias)
        pairs = zip(found, (hidden, weight, bias), strict=True)
        return None, *(None if g is None else g.to(t.dtype) for g, t in pairs), None


def _part(bias: Tensor | None, tile: slice) -> Tensor | None:
    return None if bias is None else bias[tile]


def _place_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    """Let a tensor be a b."""
    if a.dtype == to.dtype:
        torch.mm(a, b, out=to)
    else:
        to.copy_(a @ b)
