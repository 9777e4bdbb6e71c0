"""Rewritten graphs in which nothing is looked up, as compilers need them.

A compiler sees what a graph is given, not what a node finds by the identity of a weight. So the
coordinates, and the numbers that their projections are made of, become inputs of the graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch.fx import Graph, GraphModule, Node

from surgery import nodes
from surgery.coordinates import Piece, Site, site_of
from surgery.errors import CaptureError
from surgery.ledger import bodies
from surgery.projection import (
    Projection,
    compress,
    inside,
    keep,
    project,
    projected,
    projected_experts,
)

# Of the weight that is the graph's input at a place: its coordinate, or its projection's numbers.
Extra: TypeAlias = tuple[Literal["coordinate", "numbers"], int]


class Lowering:
    """A copy of a graph, made ready for a compiler.

    examples: fake tensors for the inputs that it has got, behind its own. groups: places of the
    weights that read one x. trained: whether any of its weights has a coordinate.
    """

    def __init__(self, graph: GraphModule, inputs: Sequence[Any]) -> None:
        self.examples: dict[Extra, Tensor] = {}
        self.groups: list[list[int]] = []
        self.parameters = [i for i, value in enumerate(inputs) if isinstance(value, nn.Parameter)]
        sites = self._sites(inputs)
        self.trained = bool(sites)
        self.pieces = _projected_among(sites)
        self.graph = duplicate(graph)  # of its own graph, Dynamo looks at the inputs later
        placeholders = self.graph.graph.find_nodes(op="placeholder")
        wanted = self._lower(self.graph, {node: place for place, node in enumerate(placeholders)})
        mode = detect_fake_mode(inputs)
        for kind, place in wanted:
            assert mode is not None
            piece = self.pieces[place]
            coordinate = mode.from_tensor(piece.read, static_shapes=True)
            numbers = coordinate.new_empty(piece.note.size)
            self.examples[kind, place] = coordinate if kind == "coordinate" else numbers

    def given(self, inputs: Sequence[Any]) -> list[Tensor] | None:
        """Return what the graph gets besides its inputs; None if some of it is yet to be drawn."""
        sites = self._sites(inputs)
        for site in sites.values():
            site.reached = True
        pieces = _projected_among(sites)
        if pieces.keys() != self.pieces.keys():
            raise CaptureError(
                "one captured graph runs layers that are trained and layers that are not, and was "
                "compiled for one kind. Name all of them in targets=, or leave backend= out."
            )
        for first, *others in self.groups:
            for other in others:
                pieces[other].note.share(pieces[first].note)
        found: list[Tensor] = []
        for (kind, place), example in self.examples.items():
            piece = pieces[place]
            piece.reached = True
            value = piece.read if kind == "coordinate" else piece.note.drawn
            if value is None:
                return None
            found.append(
                value if kind == "coordinate" else value.to(piece.read.device, example.dtype)
            )
        return found

    def _sites(self, inputs: Sequence[Any]) -> dict[int, Site]:
        """Return the sites of the graph's weights, by the places of these."""
        found = {place: site_of(inputs[place]) for place in self.parameters}
        return {place: site for place, site in found.items() if site is not None}

    def _lower(self, graph: GraphModule, places: dict[Node, int]) -> list[Extra]:
        """Lower one graph, and those of its checkpointed regions; return what it now wants."""
        given: dict[Extra, Node] = {}

        def need(extra: Extra) -> Node:
            if extra not in given:
                last = [*graph.graph.find_nodes(op="placeholder")][-1]
                with graph.graph.inserting_after(last):
                    given[extra] = graph.graph.placeholder(f"{extra[0]}_{extra[1]}")
                given[extra]._dynamo_source = None  # pyright: ignore[reportAttributeAccessIssue]
            return given[extra]

        for gate in graph.graph.find_nodes(op="call_function", target=nodes.gate):
            places[gate] = places[gate.args[0]]
        for node, body in [*bodies(graph)]:
            wanted = self._lower(body, inside(body, node, places))
            node.args = (*node.args, *map(need, wanted))
            node.target = tag_activation_checkpoint
        firsts: dict[Node, int] = {}
        for node in [*graph.graph.nodes]:
            if node.target is project:
                x, *weights = node.args
                group = [places[weight] for weight in weights]
                self.groups.append(group)
                numbers = need(("numbers", group[0]))
                new = self._resolve(graph, node, compress, group[0], (numbers, x))
                firsts[new] = group[0]
            elif node.target is projected:
                x, z, weight, bias, _ = node.args
                place, numbers = places[weight], need(("numbers", firsts[z]))
                whole = self.pieces[place].map is None
                coordinate = weight if whole else need(("coordinate", place))
                args = (numbers, x, z, weight, bias, coordinate)
                self._resolve(graph, node, keep, place, args)
            elif node.target is projected_experts:
                raise CaptureError(
                    "the rows of each expert are known only while the graph runs, which a compiler "
                    "does not see. Leave stacked experts out of targets=, or leave backend= out."
                )
        graph.recompile()
        return list(given)

    def _resolve(
        self, graph: GraphModule, node: Node, run: Callable[..., Any], place: int, args: Any
    ) -> Node:
        name = f"resolved_{node.name}"
        graph.add_submodule(name, Resolved(run, self.pieces[place].note))
        with graph.graph.inserting_before(node):
            new = graph.graph.call_module(name, args)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
        return new


def _projected_among(sites: Mapping[int, Site]) -> dict[int, Piece]:
    """Return the coordinates with a projection, by the places of their weights."""
    pieces = {place: site.pieces[0] for place, site in sites.items()}
    return {place: piece for place, piece in pieces.items() if piece.note is not None}


class Resolved(nn.Module):
    """A function of the projection of one weight, which is made of numbers that are an input."""

    def __init__(self, run: Callable[..., Any], projection: Projection) -> None:
        super().__init__()
        self.run = run
        self.projection = weakref.ref(projection)  # Dynamo's cache outlives the model

    def forward(self, numbers: Tensor, *args: Any) -> Tensor:
        projection = self.projection()
        assert projection is not None
        return self.run(*args, projection.made_of(numbers))


def duplicate(graph: GraphModule) -> GraphModule:
    """Return a copy of a graph, and of those that it runs, on the same tensors."""
    copied = Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    made = GraphModule(graph, copied)
    made.meta = dict(graph.meta)
    for name, module in graph.named_children():
        if isinstance(module, GraphModule) and hasattr(made, name):
            setattr(made, name, duplicate(module))
    # By these AOTAutograd knows which inputs stay where they are.
    if hasattr(graph, "_param_name_to_source"):
        made._param_name_to_source = graph._param_name_to_source
        pairs = zip(graph.graph.nodes, copied.nodes, strict=True)
        for node, new in pairs:
            if node.op == "placeholder":
                new._dynamo_source = node._dynamo_source
    return made
