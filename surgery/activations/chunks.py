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

from surgery.compat.autograd import first_order_only, keeps_graph
from surgery.compat.tensors import adds_wider
from surgery.graph.linear import rows_of
from surgery.graph.reading import name_of
from surgery.kernels.fused import compiles, launch, shared
from surgery.kernels.loss import cross_entropy, gradient_of
from surgery.kernels.plan import plan_of
from surgery.weights.matrices import wide

KEEPS_NOTHING = frozenset(["float", "to", "truediv", "div", "mul"])  # by a number, of a tensor
POINTWISE = frozenset(["float", "to", "truediv", "div", "mul", "tanh", "contiguous"])


def chunked_cross_entropy(
    body: GraphModule,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    smoothing: float,
    tokens: int | None,
    keep_logits: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the cross entropy of body(hidden W^T + b), hidden (..., D), W (V, D), and the logits.

    target: (number of rows,). Both reductions, label smoothing and ignore_index as in torch.
    """
    sizes = plan_of(hidden.device)
    rows = tokens or max(sizes.tokens, sizes.logits // (4 * weight.shape[0]))
    how = (body, ignore_index, reduction, smoothing, rows, keep_logits)
    return _Chunked.apply(how, hidden, weight, bias, target)


def _last_keeps_nothing(body: GraphModule) -> bool:
    """Whether the operation that makes the logits does not keep them for its own backward."""
    logits = body.graph.output_node().all_input_nodes[0]
    return logits.op == "placeholder" or name_of(logits) in KEEPS_NOTHING


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        how: tuple[Any, ...],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        body, ignore_index, reduction, smoothing, rows, keep_logits = how
        flat, used = rows_of(hidden), target != ignore_index
        places = target.where(used, 0)[:, None]
        divisor = used.sum().clamp(min=1) if reduction == "mean" else used.new_ones((), dtype=int)
        one = shared(body)
        pull = gradient_of(one)
        whole = pull is not None and compiles(flat, graphs=True)
        sums = _Sums(flat, weight, bias, ctx.needs_input_grad[1:4], whole, len(flat) <= rows)
        share = (used / divisor).to(wide(flat)) if whole else used / divisor
        picked, spread, shown = [], [], []
        overwrites = not keep_logits and _last_keeps_nothing(body)
        for start in range(0, max(1, len(flat)), rows):  # no rows: one empty chunk
            part = slice(start, start + rows)
            z = functional.linear(flat[part], weight, bias)
            if whole:
                how = (one, pull if sums.needed else None, smoothing, keep_logits)
                given = (z, places[part], share[part], *how)
                log_p, total, seen = launch(cross_entropy, *given, static=True)
                picked.append(log_p)
                spread += [] if total is None else [total]
                shown += [] if seen is None else [seen]
                if sums.needed:
                    sums.add(part, z)
                continue
            with torch.enable_grad():
                logits, seen = body.forward(z.requires_grad_())
            if keep_logits:
                shown.append(seen.detach())
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
            del z, logits, seen, plain, into, log_p
        # One column that holds the target's entry: torch's own sum, in torch's own order.
        column = torch.where(used, 0, ignore_index)
        loss = functional.nll_loss(
            torch.cat(picked), column, ignore_index=ignore_index, reduction=reduction
        )
        if smoothing:
            total = -torch.cat(spread).where(used, 0.0).sum() / weight.shape[0]
            total = total / used.sum() if reduction == "mean" else total
            loss = (1 - smoothing) * loss + smoothing * total
        ctx.save_for_backward(*sums.gradients(hidden))
        logits = torch.cat(shown).unflatten(0, hidden.shape[:-1]) if keep_logits else None
        if logits is not None:
            ctx.mark_non_differentiable(logits)
        return loss, logits

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        first_order_only("chunked_loss")
        scale = grads[0]
        # In place, unless another backward follows: a copy of dW would double the largest tensor of
        # the step.
        times: Any = torch.mul if keeps_graph() else Tensor.mul_
        scaled = [None if g is None else times(g, scale) for g in ctx.saved_tensors]
        return None, *scaled, None


class _Sums:
    """dh, dW and db, each only where it is needed; the sums over chunks in float32."""

    def __init__(
        self,
        flat: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: tuple[bool, ...],
        whole: bool,
        alone: bool,
    ) -> None:
        self.flat, self.weight, self.bias, self.whole = flat, weight, bias, whole
        self.needed = any(needs)
        self.d_hidden = torch.empty_like(flat) if needs[0] else None
        self.d_weight, self.d_bias = None, None
        self.alone = alone  # one chunk: nothing is summed
        if needs[1] and not alone:
            self.d_weight = torch.zeros_like(weight, dtype=torch.float32)
        self.needs_weight = needs[1]
        if bias is not None and needs[2]:
            self.d_bias = torch.zeros_like(bias, dtype=torch.float32)

    def add(self, part: slice, dz: Tensor) -> None:
        with torch.autocast(dz.device.type, enabled=False):
            if self.d_hidden is not None:
                if dz.dtype == self.d_hidden.dtype:
                    torch.mm(dz, self.weight.to(dz.dtype), out=self.d_hidden[part])
                else:
                    self.d_hidden[part] = dz @ self.weight.to(dz.dtype)
            if self.needs_weight:
                h = self.flat[part].to(dz.dtype)
                if self.d_weight is None:
                    self.d_weight = dz.t() @ h
                elif dz.dtype == self.d_weight.dtype:
                    self.d_weight.addmm_(dz.t(), h)
                elif self.whole and adds_wider(dz):
                    torch.addmm(
                        self.d_weight, dz.t(), h, out_dtype=torch.float32, out=self.d_weight
                    )
                else:
                    self.d_weight += dz.t() @ h
            if self.d_bias is not None:
                self.d_bias += dz.sum(0)

    def gradients(self, hidden: Tensor) -> list[Tensor | None]:
        dh = None if self.d_hidden is None else self.d_hidden.view(hidden.shape)
        dw = None if self.d_weight is None else self.d_weight.to(self.weight.dtype)
        db = None
        if self.bias is not None and self.d_bias is not None:
            db = self.d_bias.to(self.bias.dtype)
        return [dh, dw, db]
