"""Output head and cross entropy in chunks of tokens, exact. Prior art: Liger's fused linear loss.

With z = h W^T + b, l = f(z) (a cast, soft-capping) and y the targets, the loss and its gradients

    L = sum_i -log softmax(l_i)[y_i] / count,    dh = dz W,    dW = dz^T h,    db = sum dz

are sums over tokens i: forward computes them chunk by chunk, so that neither the logits nor their
gradient ever exist whole, and backward only scales dh, dW, db.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.nn import functional

from surgery.errors import CaptureError
from surgery.ledger import Ledger
from surgery.regions import name_of, operands
from surgery.registry import check_types, demand, register
from surgery.state import Method

# Bytes of a chunk's logits. Smaller chunks read the head's weight too often: at V = 49,152 on two
# cores, 128 tokens took 0.9x of eager's time and 64 tokens 1.2x.
CHUNK = 24 << 20
KEEPS_NOTHING = frozenset(["float", "to", "truediv", "div", "mul"])  # by a number, of a tensor
POINTWISE = frozenset(["float", "to", "truediv", "div", "mul", "tanh", "contiguous"])


@register("chunked_loss")
@dataclass(frozen=True, kw_only=True)
class ChunkedLoss:
    """Options of chunked_loss.

    keep_logits: return the logits all the same, without gradients; else the output carries
    `logits=None` while gradients are on. tokens: of a chunk (default: 24 MiB of logits).
    """

    keep_logits: bool = False
    tokens: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        enough = self.tokens is None or self.tokens >= 1
        demand(enough, self, f"tokens={self.tokens} of a chunk must be at least 1.")

    def start(self, model: nn.Module) -> Chunking:
        """Return the state of the pass on a model; changes nothing."""
        return Chunking(options=self, model=type(model).__name__)


@dataclass(eq=False, kw_only=True)
class Chunking(Method):
    options: ChunkedLoss
    model: str
    name: str = "chunked_loss"
    fixed: bool = True
    losses: int = 0
    reasons: list[str] = field(default_factory=list)  # why a cross entropy was left alone

    def rewrite(self, graph: GraphModule, inputs: Sequence[Any], ledger: Ledger) -> None:
        for loss in graph.graph.find_nodes(op="call_function", target=functional.cross_entropy):
            found = _head(loss, self.options.keep_logits)
            if isinstance(found, str):
                self.reasons.append(found)
                continue
            _replace(graph, loss, found, self.options, f"chunked_loss_{self.losses}")
            self.losses += 1

    def check_reached(self) -> None:
        if not self.losses:
            why = "; ".join(self.reasons) or "no cross entropy is computed in it"
            raise CaptureError(
                f"chunked_loss has nothing to do in the forward of {self.model}: {why}. Let the "
                "model compute the loss, model(**inputs, labels=labels).loss, or leave "
                "chunked_loss out."
            )

    def lines(self) -> Iterable[tuple[str, str]]:
        yield "chunked losses", f"{self.losses}"


def _head(loss: Node, keep_logits: bool) -> list[Node] | str:
    """Return the nodes from the head's Linear to the logits of a loss, or why that cannot be."""
    given = _arguments(loss)
    if given["weight"] is not None or given["reduction"] not in ("mean", "sum"):
        return "its cross entropy has class weights or no reduction"
    target = _value(given["target"])
    if not isinstance(target, Tensor) or target.ndim != 1 or target.is_floating_point():
        return "its targets are not one class a row"
    chain, node = [], given["input"]
    while node.target is not functional.linear:
        sources = [s for s in node.all_input_nodes if isinstance(_value(s), Tensor)]
        if len(sources) != 1 or not (name_of(node) in POINTWISE or _keeps_rows(node)):
            return f"its logits do not come from a Linear, but through {name_of(node)}"
        chain.insert(0, node)
        (node,) = sources
    chain.insert(0, node)
    names = [name_of(n) for n in chain]
    if "getitem" in names and ({"view", "reshape", "flatten"} & {*names[: names.index("getitem")]}):
        return "its logits are flattened before they are shifted"
    if "getitem" in names and keep_logits:
        return "its logits are shifted, and keep_logits=True would have to return the others too"
    for here, after in zip(chain, [*chain[1:], loss], strict=True):
        if any(user is not after and user.op != "output" for user in here.users):
            return "its logits are read by something else too"
    return chain


def _keeps_rows(node: Node) -> bool:
    """Whether a change of shape leaves the last dimension alone: a view, logits[..., :-1, :]."""
    before, after = _value(node.all_input_nodes[0]), _value(node)
    same = before.shape[-1] == after.shape[-1]
    return same and name_of(node) in ("view", "reshape", "flatten", "getitem")


def _value(node: Node) -> Any:
    return node.meta.get("example_value")


def _arguments(loss: Node) -> dict[str, Any]:
    bound = inspect.signature(functional.cross_entropy).bind(*loss.args, **loss.kwargs)
    bound.apply_defaults()
    return bound.arguments


def _replace(
    graph: GraphModule, loss: Node, chain: list[Node], options: ChunkedLoss, name: str
) -> None:
    given = _arguments(loss)
    head, *after = chain
    hidden, *weights = operands(head)
    body = Graph()
    logits = shown = body.placeholder("logits")  # shown: what the model returns as logits
    output = graph.graph.output_node()
    with graph.graph.inserting_before(loss):
        for node in after:
            source = node.all_input_nodes[0]
            if name_of(node) in POINTWISE:
                logits = body.node_copy(node, lambda _, logits=logits: logits)
            elif name_of(node) == "getitem":
                before = hidden
                hidden = graph.graph.node_copy(
                    node, lambda n, s=source, b=before: b if n is s else n
                )
            if output in node.users:
                shown = logits
        body.output((logits, shown))
        graph.add_submodule(name, GraphModule(nn.Module(), body))
        module = graph.graph.get_attr(name)
        bias = weights[1] if len(weights) > 1 else None
        how = (given["ignore_index"], given["reduction"], given["label_smoothing"])
        args = (module, hidden, weights[0], bias, given["target"], *how)
        chunks = (options.tokens, options.keep_logits)
        new = graph.graph.call_function(chunked_cross_entropy, (*args, *chunks))
        value = graph.graph.call_function(operator.getitem, (new, 0))
        kept = (
            graph.graph.call_function(operator.getitem, (new, 1)) if options.keep_logits else None
        )
    value.meta = dict(loss.meta)
    loss.replace_all_uses_with(value)
    output.args = map_arg(output.args, lambda n: kept if n in chain else n)
    for node in [loss, *reversed(chain)]:
        graph.graph.erase_node(node)


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
    rows = tokens or max(1, CHUNK // (4 * weight.shape[0]))
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
        flat, used = hidden.flatten(0, -2), target != ignore_index
        places = target.where(used, 0)[:, None]
        divisor = used.sum().clamp(min=1) if reduction == "mean" else used.new_ones((), dtype=int)
        sums = _Sums(flat, weight, bias, ctx.needs_input_grad[1:4])
        picked, spread, shown = [], [], []
        overwrites = not keep_logits and _last_keeps_nothing(body)
        for start in range(0, max(1, len(flat)), rows):  # no rows: one empty chunk
            part = slice(start, start + rows)
            z = functional.linear(flat[part], weight, bias)
            with torch.enable_grad():
                logits, seen = body(z.requires_grad_())
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
                log_p *= (used[part] / divisor)[:, None].to(log_p.dtype)
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
        scale = grads[0]
        # In place: a copy of dW would double the largest tensor of the step. A second backward
        # through the same loss is therefore refused by autograd's version check.
        scaled = [None if g is None else g.mul_(scale) for g in ctx.saved_tensors]
        return None, *scaled, None


class _Sums:
    """dh, dW and db, each only where it is needed; the sums over chunks in float32."""

    def __init__(
        self, flat: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]
    ) -> None:
        self.flat, self.weight, self.bias = flat, weight, bias
        self.needed = any(needs)
        self.d_hidden = torch.empty_like(flat) if needs[0] else None
        self.d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        self.d_bias = None
        if bias is not None and needs[2]:
            self.d_bias = torch.zeros_like(bias, dtype=torch.float32)

    def add(self, part: slice, dz: Tensor) -> None:
        with torch.autocast(dz.device.type, enabled=False):
            if self.d_hidden is not None:
                self.d_hidden[part] = dz @ self.weight.to(dz.dtype)
            if self.d_weight is not None:
                h = self.flat[part].to(dz.dtype)
                if dz.dtype == self.d_weight.dtype:
                    self.d_weight.addmm_(dz.t(), h)
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
