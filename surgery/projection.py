"""Linears that keep a projection of their input for the gradient, instead of the input.

With y = x W^T + b and a linear map C, forward keeps z = C(x) (rows, k). The coordinate S (out, k)
of W gets dS = g^T z, without ever forming x again; dx = g W is exact. Weights that read the same x
keep one z between them.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.fx import GraphModule, Node

from surgery import experts, nodes
from surgery.coordinates import Map, Piece, site_of
from surgery.ledger import Ledger, bodies
from surgery.recomputation import input_gradient, linear
from surgery.regions import is_linear, name_of, operands

T = TypeVar("T")


class Projection(Map, Protocol):
    """C and its adjoint, beside one weight as `Piece.note`; `expand` is from `Map`.

    dense: the gradient is expanded at once and goes to the weight itself. scale: of the gradient.
    """

    dense: bool

    @property
    def scale(self) -> float: ...

    @property
    def origin(self) -> str:
        """The weight whose C it uses: its own, or the first of those that read the same x."""
        ...

    @property
    def size(self) -> tuple[int, ...]:
        """The shape of the numbers that C is made of."""
        ...

    @property
    def drawn(self) -> Tensor | None:
        """The numbers that C is made of; None before the first training forward of a round."""
        ...

    def made_of(self, numbers: Tensor) -> Projection:
        """Return the same kind of projection, whose C is made of these numbers."""
        ...

    def compress(self, rows: Tensor) -> Tensor:
        """Map x (rows, in) to z (rows, k); without gradients."""
        ...

    def share(self, other: Any) -> None:
        """Use the C of the projection of another weight, which reads the same x."""
        ...


def project(x: Tensor, *weights: Tensor) -> Tensor | None:
    """Return z of x (..., in) for weights that read it; None if none of them needs it now."""
    sites = [site for weight in weights if (site := site_of(weight)) is not None]
    found = [site.pieces[0] for site in sites if site.pieces[0].note is not None]
    for other in found[1:]:
        other.note.share(found[0].note)
    if not any(piece.active for piece in found):
        return None
    return compress(x, found[0].note)


def compress(x: Tensor, projection: Projection) -> Tensor:
    """Return z (rows, k) of x (..., in)."""
    with torch.no_grad():
        return projection.compress(x.detach().reshape(-1, x.shape[-1]))


def projected(
    x: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor | None, transposed: bool
) -> Tensor:
    """Return x W^T + b (or x W + b if transposed), keeping z (rows, k) for the gradient."""
    piece = _reached(weight)
    if z is None or piece is None:
        return linear(x, weight, bias, transposed)
    return keep(x, z, weight, bias, piece.read, piece.note)


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


def projected_experts(
    x: Tensor, z: Tensor | None, weight: Tensor, offsets: Tensor, fused: bool
) -> Tensor:
    """Return x W_e^T for rows x (rows, in) sorted by expert e, keeping z (rows, k)."""
    piece = _reached(weight)
    if z is None or piece is None:
        return experts.multiply(x, weight.transpose(-2, -1), offsets, fused)
    return experts.ProjectedExperts.apply(x, z, weight.detach(), offsets, piece.read, fused)


def _reached(weight: Tensor) -> Piece | None:
    """Return the projected coordinate of a weight, if it has one that is being trained now."""
    site = site_of(weight)
    if site is None:
        return None
    site.reached = True
    piece = site.pieces[0]
    piece.reached = True
    return piece if piece.note is not None and piece.active else None


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
        ctx.projection, ctx.given = projection, (x.shape, x.dtype, coordinate.dtype)
        ctx.bias = None if bias is None else bias.dtype
        ctx.save_for_backward(z, weight)
        return linear(x, weight, bias, projection.transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, weight = ctx.saved_tensors
        shape, dtype, wanted = ctx.given
        rows = grads[0].reshape(-1, grads[0].shape[-1])
        dx = db = ds = None
        if ctx.needs_input_grad[0]:
            dx = input_gradient(rows, weight, ctx.projection.transposed).view(shape).to(dtype)
        if ctx.needs_input_grad[3]:
            db = rows.sum(0).to(ctx.bias)
        if ctx.needs_input_grad[4]:
            ds = (rows.t() @ z.to(rows.dtype)).to(wanted)
            if ctx.projection.scale != 1.0:
                ds *= ctx.projection.scale
            if ctx.projection.dense:
                ds = ctx.projection.expand(ds)
                ds = ds.t() if ctx.projection.transposed else ds
        return dx, None, None, db, ds, None


# -- putting the nodes in --------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True)
class Rewritten:
    """Weights whose Linears were rewritten and whose x something else keeps, by what operation."""

    kept: dict[str, str] = field(default_factory=dict)


def project_linears(
    graph: GraphModule,
    inputs: Sequence[Any],
    wanted: Container[str],
    found: Rewritten,
    shared: bool = True,
) -> None:
    """Let the Linears of the wanted weights keep projections, in one captured graph, in place.

    shared: whether weights that read the same x keep one z between them.
    """
    names: dict[Node, str] = {}
    for node, value in zip(_placeholders(graph), inputs, strict=True):
        site = site_of(value) if isinstance(value, Tensor) else None
        if site is not None and site.name in wanted:
            names[node] = site.name
    if names:
        _rewrite(graph, names, shared)
        _look(graph, Ledger(graph, inputs), names, found)


def _placeholders(graph: GraphModule) -> Iterable[Node]:
    return graph.graph.find_nodes(op="placeholder")


def _rewrite(graph: GraphModule, names: dict[Node, str], shared: bool) -> None:
    for gate in graph.graph.find_nodes(op="call_function", target=nodes.gate):
        if gate.args[0] in names:
            names[gate] = names[gate.args[0]]
    groups: dict[tuple[Node, Node | None], list[Node]] = {}
    for node in graph.graph.nodes:
        found = _operands(node)
        if found and found[1] in names:
            groups.setdefault((_root(found[0]), None if shared else node), []).append(node)
    for readers in groups.values():
        x = _root(_operands(readers[0])[0])  # not the key: it may have been a reader, now replaced
        with graph.graph.inserting_before(min(readers)):
            z = graph.graph.call_function(project, (x, *(_operands(r)[1] for r in readers)))
        for reader in readers:
            own, weight, *more = _operands(reader)
            with graph.graph.inserting_before(reader):
                if is_linear(reader):
                    bias = more[0] if more else None
                    args = (own, z, weight, bias, reader.target is torch.addmm)
                    new = graph.graph.call_function(projected, args)
                else:
                    args = (own, z, weight, *more, experts.is_fused(reader))
                    new = graph.graph.call_function(projected_experts, args)
            new.meta = dict(reader.meta)
            reader.replace_all_uses_with(new)
            graph.graph.erase_node(reader)
    for node, body in bodies(graph):
        _rewrite(body, inside(body, node, names), shared)
        body.recompile()


def _operands(node: Node) -> Sequence[Node]:
    """Return x, W and what else a Linear takes, or nothing."""
    return operands(node) if is_linear(node) else experts.read(node) or ()


def _root(node: Node) -> Node:
    """Return the tensor that a node only casts: fp32 adapters each cast x for themselves."""
    while name_of(node) in ("to", "float") and len(node.all_input_nodes) == 1:
        source, value = node.all_input_nodes[0], node.meta.get("example_value")
        known = source.meta.get("example_value")
        if not isinstance(value, Tensor) or not isinstance(known, Tensor):
            break
        if value.device != known.device:
            break
        node = source
    return node


def _look(graph: GraphModule, ledger: Ledger, names: dict[Node, str], found: Rewritten) -> None:
    """Note where x is kept in spite of its projection."""
    for node in graph.graph.nodes:
        if node.target not in (projected, projected_experts) or node.args[2] not in names:
            continue
        x, _, weight, *_ = node.args
        mine = ledger.outputs[_root(x)] - ledger.free
        others = [n for n, saved in ledger.saves.items() if saved & mine and n is not node]
        if others:
            found.kept[names[weight]] = name_of(others[0])
    for node, inner in ledger.inner():
        _look(inner.module, inner, inside(inner.module, node, names), found)


def inside(body: GraphModule, node: Node, names: Mapping[Node, T]) -> dict[Node, T]:
    """Return what is known of weights by the placeholders of a checkpointed region, which `node`
    runs."""
    given = zip(_placeholders(body), node.args[1:], strict=True)
    return {own: names[arg] for own, arg in given if isinstance(arg, Node) and arg in names}
