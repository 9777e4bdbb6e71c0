"""What a forward keeps for backward, named: which operation made it, and for whom it is kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from surgery.graph.reading import module_of, name_of
from surgery.graph.saved import Saved


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Storages of one kind. where: module, with * for the number of a block. made_by: operation.

    kept_by: the operations whose backward needs it. count: of storages. bytes: of all of them.
    """

    where: str
    made_by: str
    kept_by: str
    count: int
    bytes: int

    def __str__(self) -> str:
        made = f"{self.made_by} in {self.where or 'the model'}"
        return f"{self.count} x {made}, for backward of {self.kept_by}"


def account(calls: Iterable[tuple[GraphModule, Sequence[Any]]]) -> tuple[Kept, ...]:
    """Return what captured graphs keep for these inputs, the largest kind first."""
    kinds: dict[tuple[str, str, str], list[int]] = {}
    for graph, inputs in calls:
        saved = Saved(graph, inputs, now=True)
        makers = {s: node for node in reversed(saved.outputs) for s in saved.outputs[node]}
        for storage, nodes in saved.keepers.items():
            if storage in saved.free:
                continue
            maker = makers.get(storage, nodes[0])
            by = ", ".join(dict.fromkeys(_called(node) for node in nodes))
            kind = kinds.setdefault((_where(maker), _called(maker), by), [0, 0])
            kind[0] += 1
            kind[1] += saved.size[storage]
    found = [
        Kept(where=where, made_by=made, kept_by=by, count=count, bytes=size)
        for (where, made, by), (count, size) in kinds.items()
    ]
    return tuple(sorted(found, key=lambda kept: -kept.bytes))


def _called(node: Node) -> str:
    return node.meta.get("called") or name_of(node)


def _where(node: Node) -> str:
    """Return the path of the module that a node comes from, blocks numbered *."""
    return ".".join("*" if part.isdigit() else part for part in module_of(node).split("."))
