"""torch's losses over logits, in chunks of rows; rows whose target is ignored are not computed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from surgery.compat.tensors import bare, is_fake, is_playing
from surgery.errors import SurgeryError
from surgery.kernels.autocast import Cast, cast_now
from surgery.kernels.plan import plan_of
from surgery.logits.calls import name_of
from surgery.logits.chains import chain, in_tiles, under_log_softmax
from surgery.logits.cross_entropy import chunked_cross_entropy
from surgery.logits.evaluate import announcing, each_row, mean, total
from surgery.logits.expression import Columns, Expression, Head, Op, Rows, over_rows
from surgery.logits.factored import (
    Factored,
    classes_of,
    count_of,
    current,
    handles,
    made,
    rows_of,
)
from surgery.logits.reductions import check_classes
from surgery.logits.sums import tokens_of
from surgery.logits.written import operand, result_dtype, write

# The arguments of both losses, in their order.
_BY_CLASS = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction")


@handles("cross_entropy")
def _cross_entropy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = dict(zip((*_BY_CLASS, "label_smoothing"), args, strict=False)) | kwargs
    smoothing = max(0.0, given.get("label_smoothing", 0.0))  # as torch takes less than 0
    if smoothing > 1:
        raise SurgeryError(f"cross_entropy: label_smoothing={smoothing} must be between 0 and 1.")
    return _by_class(given, functional.cross_entropy, {"label_smoothing": smoothing})


@handles("nll_loss")
def _nll_loss(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _by_class(dict(zip(_BY_CLASS, args, strict=False)) | kwargs, functional.nll_loss, {})


def _by_class(given: dict[str, Any], loss: Any, how: dict[str, Any]) -> Any:
    t, target, weight = given["input"], given["target"], given.get("weight")
    reduction, ignored = given.get("reduction", "mean"), given.get("ignore_index", -100)
    old = given.get("size_average") is not None or given.get("reduce") is not None
    if not isinstance(t, Factored) or old or reduction not in ("mean", "sum", "none"):
        return NotImplemented
    if isinstance(weight, Factored) or not (t.moved or len(rows_of(t)) <= 1):
        return NotImplemented  # torch takes another dimension for the classes
    rows, count = rows_of(t), count_of(t)
    if isinstance(target, Factored) or target.is_floating_point():
        if not rows:
            return NotImplemented
        return _by_probabilities(t, target, weight, reduction, how)
    if target.dtype == torch.uint8:
        target = target.long()
    if target.dtype != torch.int64:
        raise SurgeryError(
            f"{loss.__name__}: the targets are {target.dtype}, and must be torch.int64: "
            "labels.long()."
        )
    if tuple(target.shape) != rows:
        raise SurgeryError(
            f"{loss.__name__}: the targets have the shape {tuple(target.shape)}, but the logits "
            f"are {rows} rows of {classes_of(t)} classes. Flatten both, logits.view(-1, "
            "logits.shape[-1]) and labels.view(-1), and shift both or neither."
        )
    check_classes(target, classes_of(t), ignored)
    root = over_rows(current(t), lambda own: own.reshape(count, own.shape[-1]))
    target, kept = target.reshape(count), _read(target.reshape(count), ignored)
    found = chain(_logits_of(root, loss)) if weight is None and reduction != "none" else None
    if found is not None and cast_now(target.device.type).dtype == found[0].dtype:
        head, body = found
        if kept is not None:
            kept = _filled(kept, target, ignored, head)
        value = chunked_cross_entropy(
            body,
            head.hidden if kept is None else head.hidden.index_select(0, kept),
            head.weight,
            head.bias,
            target if kept is None else target[kept],
            ignore_index=ignored,
            reduction=reduction,
            smoothing=how.get("label_smoothing", 0.0),
            tokens=head.tokens,
        )
        return announcing(value, head)
    if kept is not None:
        root, target = over_rows(root, lambda own: own.index_select(0, kept)), target[kept]
    values, cast = (root, Rows(target[:, None])), cast_now(target.device.type)
    op = _per_row(loss, values, weight, cast, {"ignore_index": ignored, **how})
    if reduction == "none":
        each = None
        if weight is None and not how.get("label_smoothing"):
            logits, used = _logits_of(root, loss), target != ignored
            each = in_tiles(op, logits, target.where(used, 0)[:, None], used)
        each = each_row(op, len(target)) if each is None else each
        if kept is not None:
            each = each.new_zeros(count).index_copy(0, kept.long(), each)
        return each.reshape(rows)
    summed = total(op, len(target))
    if reduction == "sum":
        return summed
    used = target != ignored
    weights = used.sum() if weight is None else weight[target.where(used, 0)].where(used, 0).sum()
    return _over(summed, weights.to(summed.dtype))


def _logits_of(root: Expression, loss: Any) -> Expression | None:
    """Return what a loss takes the log-softmax of."""
    return root if loss is functional.cross_entropy else under_log_softmax(root)


def _over(summed: Tensor, weights: Tensor) -> Tensor:
    """Return a mean; of nothing, it is nan and has no gradient, as torch's."""
    nothing = weights == 0
    return (summed / weights.masked_fill(nothing, 1.0)).masked_fill(nothing, torch.nan)


def _of_rows(loss: Any, x: Tensor, target: Tensor, *weight: Any, **how: Any) -> Tensor:
    """Return a loss of torch's for each row. target: classes (rows, 1), or probabilities."""
    target = target if target.is_floating_point() else target.squeeze(-1)
    return loss(x, target, *weight, reduction="none", **how)


def _per_row(
    loss: Any, values: Sequence[Expression], weight: Tensor | None, cast: Cast, how: dict[str, Any]
) -> Op:
    """Return `_of_rows` of logits and targets, `values`, as an expression."""
    args = (*values, *([] if weight is None else [Columns(weight)]))
    function = partial(_of_rows, loss)
    return Op(name=loss.__name__, function=function, args=args, kwargs=how, cast=cast)


def _by_probabilities(
    t: Factored, target: Tensor, weight: Tensor | None, reduction: str, how: dict[str, Any]
) -> Any:
    rows, count = rows_of(t), count_of(t)
    if not isinstance(target, Factored) and t.moved:
        target = target.movedim(1, -1)
    probabilities = operand(target, rows, classes_of(t))
    if probabilities is NotImplemented:
        return NotImplemented
    values, cast = (current(t), probabilities), cast_now(target.device.type)
    op = _per_row(functional.cross_entropy, values, weight, cast, how)
    if reduction == "none":
        return each_row(op, count).reshape(rows)
    return total(op, count) if reduction == "sum" else mean(op, count, count)


def _read(target: Tensor, ignored: int) -> Tensor | None:
    """Return the rows with a target; None: all of them, or there is no data that says which."""
    if is_fake(target) or is_playing():
        return None
    kept = (target != ignored).nonzero().squeeze(1)
    # It is kept for backward, in 32 bits.
    return None if len(kept) == len(target) else kept.int()


def _filled(kept: Tensor, target: Tensor, ignored: int, head: Head) -> Tensor:
    """Return rows that fill whole chunks, by one whose target is ignored: what is compiled for the
    shapes of chunks then serves whatever the number of targets is."""
    if not plan_of(target.device).whole:
        return kept
    lacking = -len(kept) % min(len(target), tokens_of(head.weight, head.tokens))
    spare = (target == ignored).to(torch.uint8).argmax()  # one of them; the host does not wait
    return torch.cat([kept, spare.expand(lacking)])


@handles(
    "kl_div",
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "binary_cross_entropy_with_logits",
    "binary_cross_entropy",
)
def _elementwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = name_of(func)
    order = ("input", "target", "weight" if name.startswith("binary") else "size_average")
    given = dict(zip(order, args, strict=False)) | kwargs
    # A mean by weights is over the weights, but for binary_cross_entropy.
    strange = not name.startswith("binary") and given.get("weight") is not None
    old = given.get("size_average") is not None or given.get("reduce") is not None
    if len(args) > len(order) or strange or old:
        return NotImplemented
    reduction = given.pop("reduction", "mean")
    given.pop("size_average", None)
    t = next(v for v in (given["input"], given["target"]) if isinstance(v, Factored))
    how = {k: v for k, v in given.items() if k not in ("input", "target")} | {"reduction": "none"}
    values = (given["input"], given["target"])
    op = write(t, getattr(functional, name), values, how)
    if op is NotImplemented or t.moved:
        return NotImplemented
    if reduction == "none":
        return made(op, rows_of(t), classes_of(t), result_dtype(op, values, how))
    if reduction == "sum":
        return total(op, count_of(t))
    number = {"mean": count_of(t) * classes_of(t), "batchmean": bare(t)[0]}.get(reduction)
    return NotImplemented if number is None else mean(op, count_of(t), number)
