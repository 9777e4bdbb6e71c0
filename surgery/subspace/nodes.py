"""Linears that keep a projection of their input for the gradient, instead of the input.

With y = x W^T + b and a linear map C, forward keeps z = C(x) (rows, k). The coordinate S (out, k)
of W gets dS = g^T z, without ever forming x again; dx = g W is exact. Weights that read the same x
keep one z between them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from surgery.compat.autograd import first_order_only
from surgery.compat.tensors import is_fake
from surgery.graph.linear import linear, note_given, rows_of, sent_back
from surgery.graph.nodes import by_identity
from surgery.subspace import experts
from surgery.weights.coordinate import Beside, Coordinate
from surgery.weights.sites import site_of, trained_by


class Projection(Beside, ABC):
    """C and its adjoint beside one weight; also the `Map` of its coordinate.

    transposed: whether the weight is stored as (in, out). dense: whether the gradient is expanded
    at once and goes to the weight itself. scale: a factor of the gradient. by: the name of the
    pass, for errors.
    """

    transposed: bool
    by: ClassVar[str] = "a projection"
    dense: bool = False

    @property
    def scale(self) -> float:
        return 1.0

    @property
    @abstractmethod
    def origin(self) -> str:
        """The weight whose C it uses: its own, or the first of those that read the same x."""

    @property
    @abstractmethod
    def width(self) -> int:
        """k, the channels of z."""

    @property
    @abstractmethod
    def size(self) -> tuple[int, ...]:
        """The shape of the numbers that C is made of."""

    @property
    @abstractmethod
    def drawn(self) -> Tensor | None:
        """The numbers that C is made of; None before the first training forward of a round."""

    @abstractmethod
    def made_of(self, numbers: Tensor) -> Projection:
        """Return the same kind of projection, whose C is made of these numbers."""

    @abstractmethod
    def compress(self, rows: Tensor) -> Tensor:
        """Map x (rows, in) to z (rows, k); without gradients. Never called in a dry run."""

    @abstractmethod
    def share(self, other: Any) -> None:
        """Use the C of the projection of another weight, which reads the same x."""

    @abstractmethod
    def expand(self, delta: Tensor) -> Tensor:
        """Return the whole change (out, in) that a change of the coordinate stands for."""

    def change(self, delta: Tensor, part: slice) -> Tensor:
        """Return these rows of `expand(delta)`."""
        return self.expand(delta[part])

    def adjoint(self, gradient: Tensor) -> Tensor | None:
        """Return dS = dW C of a whole gradient (out, in), such as that of a penalty."""
        return self.compress(gradient) * self.scale

    def pure(self) -> tuple[Any, ...] | None:
        """Return `expand` as a pure function, see `Map.pure`; None: it runs as it is."""
        return None

    def add_into(self, matrix: Tensor, delta: Tensor) -> None:
        """Add `expand(delta)` to the weight's matrix (out, in), of the same dtype, in place."""
        matrix += self.expand(delta)


def projection_of(coordinate: Coordinate) -> Projection:
    """Return what stands beside a projected weight."""
    assert isinstance(coordinate.beside, Projection)
    return coordinate.beside


@by_identity
def project(x: Tensor, *weights: Tensor) -> Tensor | None:
    """Return z of x (..., in) for weights that read it; None if none of them needs it now."""
    sites = [site for weight in weights if (site := site_of(weight)) is not None]
    found = [(site.coordinates[0], own) for site in sites if (own := site.beside(Projection))]
    if not any(coordinate.active for coordinate, _ in found):
        return None
    first = found[0][1]
    if is_fake(x):
        return x.new_empty(x.shape[:-1].numel(), first.width)
    for _, other in found[1:]:
        other.share(first)
    return compress(x, first)


def compress(x: Tensor, projection: Projection) -> Tensor:
    """Return z (rows, k) of x (..., in)."""
    with torch.no_grad():
        return projection.compress(rows_of(x.detach()))


@by_identity
def projected(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    place: Tensor,
) -> Tensor:
    """Return x W^T + b (or x W + b if transposed), keeping z (rows, k) for the gradient.

    place: the model's own parameter, by whose identity the coordinate is found; `weight` may be
    what another pass has made of it.
    """
    found = trained_by(place, Projection)
    if z is None or found is None:
        return linear(x, weight.detach(), bias, transposed)
    coordinate, projection = found
    return keep(x, z, weight, bias, coordinate.read, projection)


def keep(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coordinate: Tensor,
    projection: Projection,
) -> Tensor:
    """Return `projected`, with the gradient of z going to a coordinate."""
    return _Projected.apply(x, z, weight.detach(), bias, coordinate, projection)


@by_identity
def projected_experts(
    x: Tensor, z: Tensor | None, weight: Tensor, offsets: Tensor, fused: bool, place: Tensor
) -> Tensor:
    """Return x W_e^T for rows x (rows, in) sorted by expert e, keeping z (rows, k)."""
    found = trained_by(place, Projection)
    if z is None or found is None:
        return experts.multiply(x, weight.detach().transpose(-2, -1), offsets, fused)
    coordinate, _ = found
    return experts.ProjectedExperts.apply(x, z, weight.detach(), offsets, coordinate.read, fused)


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        coordinate: Tensor,
        projection: Projection,
    ) -> Tensor:
        ctx.projection, ctx.wanted = projection, coordinate.dtype
        note_given(ctx, x, bias)
        ctx.save_for_backward(z, weight)
        return linear(x, weight, bias, projection.transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only(ctx.projection.by)
        z, weight = ctx.saved_tensors
        dx, db = sent_back(ctx, grads[0], weight, ctx.projection.transposed, bias=3)
        ds = None
        if ctx.needs_input_grad[4]:
            rows = rows_of(grads[0])
            ds = (rows.t() @ z.to(rows.dtype)).to(ctx.wanted)
            if ctx.projection.scale != 1.0:
                ds *= ctx.projection.scale
            if ctx.projection.dense:
                ds = ctx.projection.expand(ds)
                ds = ds.t() if ctx.projection.transposed else ds
        return dx, None, None, db, ds, None
