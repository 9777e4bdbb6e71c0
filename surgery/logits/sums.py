"""The gradients of a head, dh = dz W, dW = dz^T h, db = sum dz, added up over chunks of rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.compat.autograd import keeps_graph
from surgery.compat.tensors import adds_wider
from surgery.kernels.plan import bands, plan_of
from surgery.weights.matrices import wide

_BAND = 1 << 20  # entries


class Sums:
    """Of one head: each gradient only where it is needed, sums over chunks in float32 at least.

    hidden: (rows, D). needs: of hidden, weight and bias. one: there is one chunk only.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: Sequence[bool],
        one: bool,
    ) -> None:
        self.hidden, self.weight, self.one = hidden, weight, one
        self.needs_weight, self.needed = needs[1], any(needs)
        self.d_hidden = torch.empty_like(hidden) if needs[0] else None
        self.d_weight, self.d_bias = None, None
        if needs[1] and not one:
            self.d_weight = torch.zeros_like(weight, dtype=wide(weight))
        if bias is not None and needs[2]:
            self.d_bias = torch.zeros_like(bias, dtype=wide(bias))

    def add(self, part: slice, dz: Tensor | None) -> None:
        """Add what a chunk of rows gives: dz (rows of the chunk, V); None: nothing."""
        if dz is None:
            if self.d_hidden is not None:
                self.d_hidden[part] = 0
            return
        with torch.autocast(dz.device.type, enabled=False):
            if self.d_hidden is not None:
                if dz.dtype == self.d_hidden.dtype:
                    torch.mm(dz, self.weight.to(dz.dtype), out=self.d_hidden[part])
                else:
                    self.d_hidden[part] = dz @ self.weight.to(dz.dtype)
            if self.needs_weight:
                self._add_weight(self.hidden[part].to(dz.dtype), dz)
            if self.d_bias is not None:
                self.d_bias += dz.sum(0)

    def _add_weight(self, h: Tensor, dz: Tensor) -> None:
        if self.d_weight is None:
            self.d_weight = dz.t() @ h
        else:
            add_product(self.d_weight, dz.t(), h)

    def all(self) -> list[Tensor | None]:
        """Return the gradients of hidden, weight and bias."""
        return [self.d_hidden, self.d_weight, self.d_bias]


def add_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to a sum of the same dtype, or a wider one."""
    if a.dtype == to.dtype:
        to.addmm_(a, b)
    elif plan_of(a.device).whole and adds_wider(a):
        torch.addmm(to, a, b, out_dtype=torch.float32, out=to)
    else:
        # By bands, or the product would be as large as the sum.
        for band in bands(to.shape[0], to.shape[1], _BAND):
            to[band] += a[band] @ b


def scaled(kept: Iterable[Tensor | None], scale: Tensor) -> list[Tensor | None]:
    """Return gradients that have waited for backward, times what it begins with.

    In place, unless another backward follows: a copy of dW would double the largest tensor of the
    step.
    """
    times: Any = torch.mul if keeps_graph() else Tensor.mul_
    return [None if g is None else times(g, scale) for g in kept]


def tokens_of(weight: Tensor, asked: int | None) -> int:
    """Return how many rows of logits by a head (V, D) are computed at a time."""
    sizes = plan_of(weight.device)
    rows = max(sizes.tokens, sizes.logits // (4 * weight.shape[0]))
    # Products of few rows read the head's weight too often: at V = 128,256 and D = 1,024 on two
    # cores, 128 rows took 1.15x of eager's time with a frozen head, 256 rows 0.95x. A chunk is as
    # large as a quarter of the weight at most.
    return asked or max(rows, 0 if sizes.whole else min(256, weight.shape[1] // 4))
