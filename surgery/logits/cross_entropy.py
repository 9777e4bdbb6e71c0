"""Output head and cross entropy in chunks of tokens: neither logits nor their gradient stand whole.

With z = h W^T + b, l = f(z) (a cast, soft-capping) and y the targets, the loss and its gradients

    L = sum_i -log softmax(l_i)[y_i] / count,    dh = dz W,    dW = dz^T h,    db = sum dz

are sums over tokens i: forward computes them chunk by chunk, and backward only scales dh, dW, db.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional

from surgery.compat.autograd import first_order_only
from surgery.graph.linear import rows_of
from surgery.graph.reading import name_of
from surgery.kernels.autocast import cast_now
from surgery.kernels.fused import compiles, launch, shared
from surgery.kernels.loss import cross_entropy, gradient_of
from surgery.logits.sums import Sums, scaled, tokens_of
from surgery.weights.matrices import wide

_KEEPS_NOTHING = frozenset(["float", "to", "truediv", "div", "mul"])  # by a number, of a tensor


def chunked_cross_entropy(
    body: GraphModule,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    smoothing: float = 0.0,
    tokens: int | None = None,
) -> Tensor:
    """Return the cross entropy of logits body(hidden W^T + b), hidden (..., D), W (V, D).

    body: of operations by numbers. target: (number of rows,), classes. Both reductions, label
    smoothing and ignore_index as in torch. tokens: of a chunk.
    """
    how = (body, ignore_index, reduction, smoothing, tokens_of(weight, tokens))
    return _Chunked.apply(how, hidden, weight, bias, target)


def _last_keeps_nothing(body: GraphModule) -> bool:
    """Whether the operation that makes the logits does not keep them for its own backward."""
    logits = body.graph.output_node().all_input_nodes[0]
    return logits.op == "placeholder" or name_of(logits) in _KEEPS_NOTHING


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        how: tuple[Any, ...],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
    ) -> Tensor:
        body, ignore_index, reduction, smoothing, rows = how
        flat, used = rows_of(hidden), target != ignore_index
        places = target.where(used, 0)[:, None]
        divisor = used.sum().clamp(min=1) if reduction == "mean" else used.new_ones((), dtype=int)
        one = shared(body)
        pull = gradient_of(one)
        whole = pull is not None and compiles(flat, graphs=True)
        sums = Sums(flat, weight, bias, ctx.needs_input_grad[1:4], one=len(flat) <= rows)
        # 1 / count and slopes of a softmax are too small together for float16, which GradScaler's
        # scale is to save: there the sums wait as they are, weights' in float32.
        half = (cast_now(flat.device.type).dtype or flat.dtype) == torch.float16
        share = used.to(wide(flat)) / (1 if half else divisor)
        picked, spread = [], []
        overwrites = _last_keeps_nothing(body)
        for start in range(0, max(1, len(flat)), rows):  # no rows: one empty chunk
            part = slice(start, start + rows)
            z = functional.linear(flat[part], weight, bias)
            if whole:
                given = (z, places[part], share[part], one, pull if sums.needed else None)
                log_p, total = launch(cross_entropy, *given, smoothing, static=True)
                picked.append(log_p)
                spread += [] if total is None else [total]
                if sums.needed:
                    sums.add(part, z)
                continue
            with torch.enable_grad():
                logits = body.forward(z.requires_grad_())
            plain = logits.detach()
            # In place where nothing else reads the logits: they are a chunk's largest tensor.
            into = plain if overwrites else torch.empty_like(plain)
            log_p = torch.log_softmax(plain, -1, out=into)
            picked.append(log_p.gather(1, places[part]))
            if smoothing:
                spread.append(log_p.sum(-1))
            if sums.needed:
                log_p.exp_()  # softmax; then minus the target distribution
                log_p.scatter_add_(1, places[part], log_p.new_full((len(z), 1), smoothing - 1))
                if smoothing:
                    log_p -= smoothing / log_p.shape[-1]
                log_p *= share[part][:, None].to(log_p.dtype)
                sums.add(part, torch.autograd.grad(logits, z, log_p.to(logits.dtype))[0])
            # Or they would live on while the next chunk is computed.
            del z, logits, plain, into, log_p
        # One column that holds the target's entry: torch's own sum, in torch's own order.
        # Its number is 0, which may be what is ignored.
        column = torch.where(used, 0, -100)
        loss = functional.nll_loss(torch.cat(picked), column, reduction=reduction)
        if smoothing:
            total = -torch.cat(spread).where(used, 0.0).sum() / weight.shape[0]
            total = total / used.sum() if reduction == "mean" else total
            loss = (1 - smoothing) * loss + smoothing * total
        d_hidden, *others = sums.all()
        d_hidden = None if d_hidden is None else d_hidden.view(hidden.shape)
        pairs = zip((d_hidden, *others), (hidden, weight, bias), strict=True)
        kept = [g if g is None or t is None or half else g.to(t.dtype) for g, t in pairs]
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        ctx.save_for_backward(*kept, divisor if half else None)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only("chunked_loss")
        (scale,) = grads
        *kept, divisor = ctx.saved_tensors
        scale = scale if divisor is None else scale / divisor
        pairs = zip(scaled(kept, scale), ctx.dtypes, strict=True)
        return None, *(None if g is None else g.to(dtype) for g, dtype in pairs), None
