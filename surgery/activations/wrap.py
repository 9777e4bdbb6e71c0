"""Putting `packed.held` around operations of a captured graph."""

from __future__ import annotations

import operator

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from surgery.activations.packed import Packer, held, share
from surgery.graph.reading import name_of
from surgery.graph.saved import Saved
from surgery.kernels.bits import fills


class Wrapper:
    """Wraps operations of one graph, which share the packed form of the chosen storages."""

    def __init__(self, graph: GraphModule, saved: Saved, chosen: set[int]) -> None:
        self.graph, self.saved, self.chosen = graph, saved, chosen
        self.whole: dict[int, Node] = {}  # storage -> what stands for it where it is kept
        self.part: dict[Node, Node] = {}
        self.latest: dict[Node, Node] = {}  # node -> what has taken its place
        self.filling: dict[int, Node] = {}  # storage -> the first node whose result covers it
        for node in saved.outputs:
            value = saved.env.get(node)
            if isinstance(value, Tensor) and fills(value):
                self.filling.setdefault(next(iter(saved.outputs[node])), node)

    def wrap(self, node: Node, packer: Packer) -> None:
        """Replace an operation by `held`. Call it in the order of the graph."""
        kept = self.saved.saves[node] & self.chosen
        sources = {n: s for n in node.all_input_nodes for s in self.saved.outputs[n] & kept}
        shares = list(dict.fromkeys(self._share(n, s) for n, s in sources.items()))
        body, copies = Graph(), {}
        for source in node.all_input_nodes:
            copies[source] = body.placeholder(source.name)
        body.output(body.node_copy(node, lambda n: copies[n]))
        run = GraphModule(nn.Module(), body)
        run.meta["packer"] = packer
        name = f"held_{node.name}"
        self.graph.add_submodule(name, run)
        with self.graph.graph.inserting_before(node):
            module = self.graph.graph.get_attr(name)
            args = (module, len(shares), *shares, *node.all_input_nodes)
            both = self.graph.graph.call_function(held, args)
            result = self.graph.graph.call_function(operator.getitem, (both, 0))
            own = self.graph.graph.call_function(operator.getitem, (both, 1))
        both.meta = {k: v for k, v in node.meta.items() if k != "example_value"}
        both.meta["called"] = name_of(node)
        result.meta = dict(node.meta)
        for storage, first in self.filling.items():
            if first is node:
                self.whole[storage] = own
        self.latest[node] = result
        self.saved.outputs[result] = self.saved.outputs[node]
        node.replace_all_uses_with(result)
        self.graph.graph.erase_node(node)

    def _share(self, node: Node, storage: int) -> Node:
        """Return the node that stands for a value where it is kept; one for each storage."""
        first = self.filling.get(storage)
        if first is not None and storage in self.whole:
            return self.whole[storage]
        if first is None and node in self.part:
            return self.part[node]
        value = node if first is None else self.latest.get(first, first)
        with self.graph.graph.inserting_after(value):
            made = self.graph.graph.call_function(share, (value,))
        if first is None:
            self.part[node] = made
        else:
            self.whole[storage] = made
        return made
