"""Tables of which some rows are trained: lookups and heads that make gradients of these alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from surgery.compat.autograd import first_order_only
from surgery.compat.tensors import is_fake, is_playing
from surgery.errors import ModelError
from surgery.graph.calls import put
from surgery.graph.linear import note_given, rows_of, sent_back
from surgery.graph.nodes import by_identity, gate
from surgery.graph.reading import is_linear, operands, placeholders
from surgery.weights.coordinate import Coordinate, Copied, resting
from surgery.weights.indices import Rows
from surgery.weights.matrices import wide
from surgery.weights.sites import read, site_of

_LOOKUP = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq")


def rows_coordinate(model: nn.Module, name: str, numbers: Sequence[int]) -> Coordinate:
    """Return a coordinate for some rows of a weight: a copy of these rows in at least float32."""
    weight = model.get_parameter(name)
    index = Rows(torch.tensor(sorted({*numbers}), device="cpu"))
    return Coordinate(
        weight=name,
        parameter=resting(weight, wide(weight), index),
        rule=Copied(index=index),
        owner=model.get_submodule(name.rpartition(".")[0]),
        drawn=True,
    )


def look_up_rows(graph: GraphModule, inputs: Sequence[Any]) -> set[str]:
    """Make lookups and Linears in a captured graph compute gradients of the trained rows only.

    Changes the graph in place, for weights with a coordinate of `rows_coordinate`. Returns the
    names of the weights that are looked up.
    """
    found: set[str] = set()
    for place, value in zip(placeholders(graph), inputs, strict=True):
        site = site_of(value) if isinstance(value, Tensor) else None
        if site is None or not isinstance(site.coordinates[0].index, Rows):
            continue
        for gated in [user for user in place.users if user.target is gate]:
            for user in [*gated.users]:
                if user.target is functional.embedding:
                    given = dict(zip(_LOOKUP, user.args, strict=False)) | user.kwargs
                    how = (given.get("padding_idx"), bool(given.get("scale_grad_by_freq")))
                    if given["weight"] is gated and given.get("max_norm") is None:
                        put(graph, user, looked_up, given["input"], place, *how)
                        found.add(site.name)
                elif is_linear(user) and user.target is functional.linear:
                    x, weight, *bias = operands(user)
                    if weight is gated:
                        put(graph, user, scored, x, place, bias[0] if bias else None)
            if not gated.users:
                graph.graph.erase_node(gated)
    return found


@by_identity
def looked_up(ids: Tensor, weight: Tensor, padding: int | None, by_frequency: bool) -> Tensor:
    """Return the rows of a weight with these numbers; ModelError if one of them is not trained."""
    trained = _trained(weight)
    if trained is None:
        weight = weight if is_fake(weight) else weight.detach()
        return functional.embedding(ids, weight, padding, scale_grad_by_freq=by_frequency)
    coordinate, index = trained
    places = torch.searchsorted(index, ids)
    _check(index, ids, coordinate)
    pad = -1
    if padding is not None:
        there = (coordinate.index.numbers == padding).nonzero()  # pyright: ignore
        pad = int(there[0]) if len(there) else -1
    return _LookedUp.apply(ids, places, weight.detach(), coordinate.read, pad, by_frequency)


@by_identity
def scored(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b, of all rows."""
    trained = _trained(weight)
    if trained is None:
        weight = weight if is_fake(weight) else weight.detach()
        return functional.linear(x, weight, bias)
    coordinate, index = trained
    return _Scored.apply(x, weight.detach(), bias, coordinate.read, index)


def _check(index: Tensor, ids: Tensor, coordinate: Coordinate) -> None:
    """Raise ModelError if some ids, or labels, are not among the rows that are trained."""
    assert isinstance(coordinate.index, Rows)
    labels = [each.to(ids.device).flatten() for each in coordinate.index.labels]
    coordinate.index.labels.clear()
    if is_playing():
        return
    given = torch.cat([ids.flatten(), *labels]) if labels else ids
    strange = (given >= 0) & ~torch.isin(given, index)
    if bool(strange.any()):  # the one time that the host waits
        bad = given[strange].unique()
        first = bad[:5].tolist()
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ModelError(
            f"trim: the batch has ids, or labels, that are not among used=: {first}{more}. Their "
            f"rows of {coordinate.weight} are not trained. Give the ids of all data, used=[*used, "
            f"{', '.join(map(str, first))}]; or run such batches under torch.no_grad()."
        )


def _trained(weight: Tensor) -> tuple[Coordinate, Tensor] | None:
    site = None if is_fake(weight) else read(weight)
    if site is None or not site.coordinates[0].active:
        return None
    coordinate = site.coordinates[0]
    assert isinstance(coordinate.index, Rows)
    return coordinate, coordinate.index.on(weight.device)


class _LookedUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, places: Tensor, weight: Tensor, rows: Tensor, *how: Any
    ) -> Tensor:
        ctx.how, ctx.given = how, (len(rows), rows.dtype)
        ctx.save_for_backward(places)
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only("trim")
        (places,), (count, dtype) = ctx.saved_tensors, ctx.given
        backward = torch.ops.aten.embedding_dense_backward
        return None, None, None, backward(grads[0].to(dtype), places, count, *ctx.how), None, None


class _Scored(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, index: Tensor
    ) -> Tensor:
        ctx.dtype = rows.dtype
        note_given(ctx, x, bias)
        ctx.save_for_backward(x, weight, index)
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only("trim")
        x, weight, index = ctx.saved_tensors
        dx, db = sent_back(ctx, grads[0], weight, False, bias=2)
        slopes = rows_of(grads[0])
        features = rows_of(x).to(slopes.dtype)
        ds = slopes.index_select(1, index).t() @ features
        return dx, None, db, ds.to(ctx.dtype), None
