"""The nodes of the kit as compilers take them: what they would look up is an input of the graph."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from surgery.errors import CaptureError
from surgery.graph.lowering import Body, lowers, stepped
from surgery.subspace.nodes import (
    Projection,
    compress,
    keep,
    project,
    projected,
    projected_experts,
    projection_of,
)
from surgery.weights.coordinate import Coordinate, Whole


def numbers(c: Coordinate) -> Tensor | None:
    """Return what the projection is made of."""
    return projection_of(c).drawn


@lowers(project)
def lower_project(body: Body, node: Node) -> None:
    """z = C(x), C made of an input; weights that read one x share the first one's."""
    x, *weights = node.args
    places = [body.places[weight] for weight in weights if isinstance(weight, Node)]
    first = body.lowering.coordinates[places[0]]

    def share(now: Mapping[int, Coordinate]) -> None:
        for other in places[1:]:
            projection_of(now[other]).share(projection_of(now[places[0]]))

    body.lowering.prepare.append(share)
    own = _numbers(body, places[0], first)
    resolved = Resolved(compress, projection_of(first))
    body.notes[body.replace(node, resolved, own, x)] = own


@lowers(projected)
def lower_projected(body: Body, node: Node) -> None:
    """y = x W^T + b, keeping z for the gradient of a coordinate that is an input."""
    x, z, weight, bias, _, place = node.args
    assert isinstance(z, Node) and isinstance(place, Node)
    c = body.coordinate(place)
    own = weight if isinstance(c.rule, Whole) else body.look(place, stepped, c.read)
    resolved = Resolved(keep, projection_of(c))
    body.replace(node, resolved, body.notes[z], x, z, weight, bias, own)


@lowers(projected_experts)
def lower_projected_experts(body: Body, node: Node) -> None:
    """Raise CaptureError: not served."""
    raise CaptureError(
        "the rows of each expert are known only while the graph runs, and a compiler cannot see "
        "them. Leave stacked experts out of targets=, or leave backend= out."
    )


def _numbers(body: Body, place: int, c: Coordinate) -> Node:
    weight = next(node for node, known in body.places.items() if known == place)
    return body.look(weight, numbers, c.read.new_empty(projection_of(c).size))


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
