"""Regions: cheap operations, and the Linears that read their results, run as one node.

A region keeps its inputs for backward instead of everything that its operations would keep. It is
grown backwards from an operation whose result or inputs are kept, and cut where that saves most:
what something else keeps anyway costs nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from surgery.activations.recomputed import Reader, Spec, recomputed
from surgery.graph.reading import is_random, name_of
from surgery.graph.reduced import is_reader, is_turned, place_of, read_by
from surgery.graph.saved import GENERATOR, Saved

LARGEST = 48  # operations in a region; a norm has 6, NewGELU 9, a norm under LoRA about 20


Cheap = Callable[[Node], bool]


_SCOPES = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled")


@dataclass(eq=False, kw_only=True)
class Region:
    """members: recomputed in backward. readers: Linears whose input is a member's result."""

    members: set[Node]
    readers: set[Node] = field(default_factory=set)
    gain: int = 0  # bytes

    @property
    def nodes(self) -> set[Node]:
        return self.members | self.readers

    @property
    def random(self) -> bool:
        return any(is_random(member) for member in self.members)


class Finder:
    """Finds the regions of one graph by what its nodes save."""

    def __init__(self, graph: GraphModule, saved: Saved, cheap: Cheap) -> None:
        self.saved = saved
        self.order = list(graph.graph.nodes)
        self.place = {node: i for i, node in enumerate(self.order)}
        self.before: dict[Node, int] = {}  # bit set of all that a node depends on
        self.scope = scopes(self.order)
        for node in self.order:
            mask = 1 << self.place[node]
            for source in node.all_input_nodes:
                mask |= self.before[source]
            self.before[node] = mask
        self.taken: set[Node] = set()
        self.savers: dict[int, set[object]] = {s: set(n) for s, n in saved.keepers.items()}
        self.written = saved.written
        self.cheap = {n for n in self.order if cheap(n) and isinstance(saved.env.get(n), Tensor)}

    def find(self) -> list[Region]:
        """Return the regions that are worth cutting out, the last one first; none overlap."""
        found = []
        for seed in reversed(self.order):
            if seed in self.cheap and seed not in self.taken and self._keeps(seed):
                region = self._grow(seed)
                if region is not None:
                    found.append(region)
                    self._settle(region)
        return found

    def _keeps(self, node: Node) -> bool:
        reads = any(
            self.saved.saves[u] & self.saved.outputs[node] for u in node.users if is_reader(u)
        )
        return bool(self.saved.saves[node]) or reads

    def _settle(self, region: Region) -> None:
        for storage, savers in self.savers.items():
            savers -= region.nodes
            if storage in self._needs(region):
                savers.add(region)
        self.taken |= region.nodes

    def _grow(self, seed: Node) -> Region | None:
        region, best = Region(members=set()), None
        fresh = seed
        while len(region.members) < LARGEST:
            grown = self._with(region, fresh)
            if grown is None:
                break
            region = grown
            if region.gain > (best.gain if best else 0) and self._fits(region):
                best = region
            producers = {
                n
                for member in region.members
                for n in member.all_input_nodes
                if n in self.cheap - self.taken - region.members
                and self.scope[n] == self.scope[seed]
            }
            if not producers:
                break
            fresh = max(producers, key=lambda n: self.place[n])
        return best

    def _with(self, region: Region, node: Node) -> Region | None:
        """Return the region with one more member, and with all that then belongs to it."""
        grown = Region(members=region.members | {node}, readers=set(region.readers))
        if not self.convex(grown):
            return None
        pending = [node]
        while pending:
            end = pending.pop()
            for user in end.users:
                if user in self.taken | grown.nodes or not self._leads_to_linear(end, user):
                    continue
                into = grown.readers if is_reader(user) else grown.members
                into.add(user)
                if self.scope[user] != self.scope[node] or not self.convex(grown):
                    into.discard(user)
                elif user in grown.members:
                    pending.append(user)
        grown.gain = self._gain(grown)
        return grown

    def _leads_to_linear(self, value: Node, user: Node, depth: int = 4) -> bool:
        """Whether a Linear reads `value`, as its x and nothing else, through cheap operations."""
        if is_reader(user):
            return read_by(user)[0] is value and value not in read_by(user)[1:]
        further = depth > 0 and user in self.cheap
        return further and any(self._leads_to_linear(user, u, depth - 1) for u in user.users)

    def convex(self, region: Region) -> bool:
        """Whether all inputs are there before any result is, and stay what they are."""
        mask = sum(1 << self.place[n] for n in region.nodes)
        return not any(
            self.before[n] & mask or self.saved.outputs[n] & self.written for n in inputs(region)
        )

    def _needs(self, region: Region) -> set[int]:
        return {s for n in sources(region) for s in self.saved.outputs[n]} - self.saved.free

    def _gain(self, region: Region) -> int:
        own = region.nodes
        kept = {s for s, savers in self.savers.items() if savers & own}
        elsewhere = {s for s in kept | self._needs(region) if self.savers.get(s, set()) - own}
        bytes_of = self.saved.bytes
        before, after = kept - elsewhere, self._needs(region) - elsewhere
        return bytes_of(before) - bytes_of(after) - region.random * GENERATOR

    def _fits(self, region: Region) -> bool:
        """Whether the region can run in one place, with random numbers drawn in the same order."""
        start = self.start(region)
        users = {u for n in region.nodes for u in n.users} - region.nodes
        if any(self.place[user] < start for user in users):
            return False
        drawing = [self.place[n] for n in region.members if is_random(n)]
        if not drawing:
            return True
        between = self.order[start : max(drawing)]
        return not any(is_random(n) and n not in region.members for n in between)

    def start(self, region: Region) -> int:
        """Return the place from which on all inputs are there, in the scope of the members."""
        scope = self.scope[next(iter(region.members))]
        first = next(i for i, n in enumerate(self.order) if self.scope[n] == scope)
        return max([first, *(self.place[n] for n in inputs(region))]) + 1


def scopes(order: Iterable[Node]) -> dict[Node, int]:
    """Return, by a number, between which changes of autocast and gradient mode nodes stand."""
    scope, found = 0, {}
    for node in order:
        scope += name_of(node) in _SCOPES
        found[node] = scope
    return found


def inputs(region: Region) -> list[Node]:
    """Return what the region reads: for its members, and the weights of its readers."""
    return _read(region, region.nodes)


def sources(region: Region) -> list[Node]:
    """Return what the members of a region read, in a fixed order."""
    return _read(region, region.members)


def _read(region: Region, readers: Iterable[Node]) -> list[Node]:
    # fx orders the nodes of a graph by their place
    read = dict.fromkeys(n for reader in sorted(readers) for n in reader.all_input_nodes)
    return [n for n in read if n not in region.nodes]


def own_graph(
    read: Sequence[Node], members: Sequence[Node], results: Sequence[Node]
) -> GraphModule:
    """Return a graph of its own for nodes of another one, in order: of what they read."""
    body, copies = Graph(), {}
    for source in read:
        copies[source] = body.placeholder(source.name)
    for member in members:
        copies[member] = body.node_copy(member, lambda n: copies[n])
    body.output(tuple(copies[result] for result in results))
    return GraphModule(torch.nn.Module(), body)


def escaping(region: Region) -> list[Node]:
    """Return the members whose results are read outside of a region, in order."""
    found = sorted(region.members)
    return [n for n in found if any(user not in region.nodes for user in n.users)]


def replace(
    graph: GraphModule,
    region: Region,
    name: str,
    body: GraphModule,
    run: Callable[..., Any],
    given: Sequence[Node],
    results: Sequence[Node],
    after: Node,
) -> None:
    """Put a call run(body, *given) behind a node, in the place of a region; it returns `results`.

    name: of the submodule that the graph gets.
    """
    graph.add_submodule(name, body)
    with graph.graph.inserting_after(after):
        module = graph.graph.get_attr(name)
    with graph.graph.inserting_after(module):
        point = node = graph.graph.call_function(run, (module, *given))
    for place, old in enumerate(results):
        with graph.graph.inserting_after(point):
            point = graph.graph.call_function(operator.getitem, (node, place))
        point.meta = dict(old.meta)
        old.replace_all_uses_with(point, delete_user_cb=lambda user: user not in region.nodes)
    for old in sorted(region.nodes, reverse=True):
        graph.graph.erase_node(old)


def cut_out(graph: GraphModule, region: Region, name: str, after: Node) -> None:
    """Replace a region by one `recomputed` node."""
    members, readers = sorted(region.members), sorted(region.readers)
    read, outside = sources(region), escaping(region)
    results = list(dict.fromkeys([*outside, *(read_by(reader)[0] for reader in readers)]))
    specs, weights, places = [], [], []
    for reader in readers:
        (end, *own), place = read_by(reader), place_of(reader)
        specs.append(Reader(results.index(end), is_turned(reader), len(own) > 1, place is not None))
        weights += own
        places += [] if place is None else [place]
    body = own_graph(read, members, results)
    body.meta["draws"] = region.random
    body.meta["spec"] = Spec(tuple(specs), len(outside), region.random, len(read))
    given, made = [*read, *weights, *places], [*outside, *readers]
    replace(graph, region, name, body, recomputed, given, made, after)
