"""Rewritten graphs in which nothing is looked up, as compilers need them.

A compiler sees what a graph is given, not what a node finds by the identity of a weight. So
whatever the nodes of a kit would find becomes an input of a copy of the graph: each kit says for
its nodes how, by `lowers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from surgery.compat.dynamo import CHECKPOINT, copy_sources, fake_mode_of, without_source
from surgery.errors import CaptureError
from surgery.graph.calls import take_place
from surgery.graph.nodes import gate
from surgery.graph.reading import bodies, inside, placeholders
from surgery.weights.coordinate import Coordinate
from surgery.weights.sites import Site, site_of

# What a graph gets of the coordinate of a weight; None as long as it is yet to be drawn.
Look: TypeAlias = Callable[[Coordinate], Tensor | None]
Lower: TypeAlias = Callable[["Body", Node], None]
L = TypeVar("L", bound=Callable[..., None])

_LOWERED: dict[Any, Lower] = {}


def lowers(target: Any) -> Callable[[L], L]:
    """Say how a call of `target` is lowered: by the function below, given (body, node)."""

    def add(lower: L) -> L:
        _LOWERED[target] = lower
        return lower

    return add


class Lowering:
    """A copy of a graph, made ready for a compiler.

    examples: fake tensors for the inputs that it has got, behind its own. trained: whether any of
    its weights has a coordinate.
    """

    def __init__(self, graph: GraphModule, inputs: Sequence[Any]) -> None:
        self.examples: dict[tuple[int, Look], Tensor] = {}
        self.prepare: list[Callable[[Mapping[int, Coordinate]], None]] = []
        self.parameters = [i for i, value in enumerate(inputs) if isinstance(value, nn.Parameter)]
        sites = self._sites(inputs)
        self.trained = bool(sites)
        self.coordinates = _found_by_nodes(sites)
        self.mode = fake_mode_of(inputs)
        self.graph = duplicate(graph)  # of its own graph, Dynamo looks at the inputs later
        places = {node: place for place, node in enumerate(placeholders(self.graph))}
        for key, example in self._lower(self.graph, places):
            self.examples[key] = example

    def given(self, inputs: Sequence[Any]) -> list[Tensor] | None:
        """Return what the graph gets besides its inputs; None if some of it is yet to be drawn."""
        sites = self._sites(inputs)
        for site in sites.values():
            site.note(reached=True)
        coordinates = _found_by_nodes(sites)
        if coordinates.keys() != self.coordinates.keys():
            raise CaptureError(
                "one captured graph runs layers that are trained and layers that are not, but was "
                "compiled for one kind. Name all of them in targets=, or leave backend= out."
            )
        for prepare in self.prepare:
            prepare(coordinates)
        found: list[Tensor] = []
        for (place, look), example in self.examples.items():
            coordinates[place].reached = True
            value = look(coordinates[place])
            if value is None:
                return None
            if value is not coordinates[place].read:
                value = value.to(coordinates[place].read.device, example.dtype)
            found.append(value)
        return found

    def _sites(self, inputs: Sequence[Any]) -> dict[int, Site]:
        """Return the sites of the graph's weights, by the places of these."""
        found = {place: site_of(inputs[place]) for place in self.parameters}
        return {place: site for place, site in found.items() if site is not None}

    def _lower(
        self, graph: GraphModule, places: dict[Node, int]
    ) -> list[tuple[tuple[int, Look], Tensor]]:
        """Lower one graph, and those of its checkpointed regions; return what it now wants."""
        body = Body(lowering=self, graph=graph, places=places)
        for node in graph.graph.find_nodes(op="call_function", target=gate):
            places[node] = places[node.args[0]]
            copied = self.coordinates.get(places[node])
            if copied is not None and copied.copied and copied.beside is None:
                with graph.graph.inserting_after(node):
                    new = graph.graph.call_function(
                        _to_copy, (node, body.look(node, stepped, copied.read))
                    )
                node.replace_all_uses_with(new, delete_user_cb=lambda user, n=new: user is not n)
                places[new] = places[node]
        for node, inner in [*bodies(graph)]:
            wanted = self._lower(inner, inside(inner, node, places))
            node.args = (*node.args, *(body.need(*key, example) for key, example in wanted))
            node.target = CHECKPOINT
        for node in [*graph.graph.nodes]:
            if node.op == "call_function" and node.target in _LOWERED:
                _LOWERED[node.target](body, node)
        graph.recompile()
        return [(key, body.examples[key]) for key in body.given]


@dataclass(eq=False, kw_only=True)
class Body:
    """One graph that is being lowered. places: its weights, by their place among the inputs."""

    lowering: Lowering
    graph: GraphModule
    places: dict[Node, int]
    given: dict[tuple[int, Look], Node] = field(default_factory=dict)
    examples: dict[tuple[int, Look], Tensor] = field(default_factory=dict)
    notes: dict[Node, Any] = field(default_factory=dict)  # of lowerings, for later ones

    def coordinate(self, weight: Node) -> Coordinate:
        """Return the coordinate of a weight as it was when the graph was captured."""
        return self.lowering.coordinates[self.places[weight]]

    def look(self, weight: Node, look: Look, example: Tensor) -> Node:
        """Return an input that is look(coordinate of the weight) in each call, like `example`."""
        mode = self.lowering.mode
        assert mode is not None
        place = self.places[weight]
        if (place, look) not in self.given:
            example = mode.from_tensor(example, static_shapes=True)
        return self.need(place, look, example)

    def need(self, place: int, look: Look, example: Tensor) -> Node:
        """Return an input as `look`, by the place of a weight."""
        key = (place, look)
        if key not in self.given:
            last = placeholders(self.graph)[-1]
            with self.graph.graph.inserting_after(last):
                self.given[key] = self.graph.graph.placeholder(f"{look.__name__}_{place}")
            without_source(self.given[key])
            self.examples[key] = example
        return self.given[key]

    def replace(self, node: Node, module: nn.Module, *args: Any) -> Node:
        """Put a call of a module, which the graph then owns, in the place of a node."""
        name = f"resolved_{node.name}"
        self.graph.add_submodule(name, module)
        with self.graph.graph.inserting_before(node):
            return take_place(self.graph.graph.call_module(name, args), node)


def _found_by_nodes(sites: Mapping[int, Site]) -> dict[int, Coordinate]:
    """Return the coordinates with something that nodes look up, by the places of their weights."""
    first = {place: site.coordinates[0] for place, site in sites.items()}
    return {place: c for place, c in first.items() if c.beside is not None or c.copied}


def stepped(coordinate: Coordinate) -> Tensor:
    """Return what the optimizer steps."""
    return coordinate.read


def _to_copy(weight: Tensor, copy: Tensor) -> Tensor:
    """Return a weight whose gradient goes to a copy of it: what is added is zero."""
    return weight.detach() + (copy - copy.detach()).to(weight.dtype)


def duplicate(graph: GraphModule) -> GraphModule:
    """Return a copy of a graph, and of those that it runs, on the same tensors."""
    copied = Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    made = GraphModule(graph, copied)
    made.meta = dict(graph.meta)
    for name, module in graph.named_children():
        if isinstance(module, GraphModule) and hasattr(made, name):
            setattr(made, name, duplicate(module))
    copy_sources(graph, made, copied)  # by these AOTAutograd knows which inputs stay where they are
    return made
