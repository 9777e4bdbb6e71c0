"""The heads of a captured graph: Linears whose results are logits, and all that is done with them.

Each is cut out as one node, in which the logits are `Factored`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import functional

from surgery.activations.regions import Region, escaping, inputs, own_graph, replace, scopes
from surgery.compat.tensors import bare, is_wrapper
from surgery.graph.lowering import Body, lowers
from surgery.graph.reading import module_of, name_of, operands, value_of
from surgery.logits.evaluate import without_gradients
from surgery.logits.factored import count_of, current, factored, is_factored, whole
from surgery.logits.written import POINTWISE
from surgery.weights.targets import blocks

_WIDE = POINTWISE | {
    *("to", "type", "contiguous", "clone", "log_softmax", "softmax", "getitem"),
    *("view", "reshape", "flatten", "unsqueeze", "squeeze", "transpose", "permute"),
}
_LOSSES = frozenset(["cross_entropy", "nll_loss"])
_NARROW = _LOSSES | {
    *("kl_div", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "gather"),
    *("binary_cross_entropy_with_logits", "sum", "mean", "logsumexp", "amax", "argmax"),
}


@dataclass(eq=False, kw_only=True)
class Logits:
    """What belongs to one head or to several whose logits are added up. heads: their Linears.
    wide: nodes with an entry a class. ends: nodes that make little of these. leaves: whether wide
    ones leave the graph."""

    heads: set[Node]
    wide: set[Node]
    ends: set[Node] = field(default_factory=set)
    leaves: bool = False

    @property
    def losses(self) -> int:
        return sum(name_of(end) in _LOSSES for end in self.ends)


@dataclass(frozen=True, kw_only=True)
class Inner:
    """What is inside of a model's blocks, whose results may leave a piece of a forward that Dynamo
    has cut, and no model. prefixes: of modules. vocabularies: of its embeddings."""

    prefixes: tuple[str, ...]
    vocabularies: frozenset[int]

    def holds(self, linear: Node) -> bool:
        """Whether a Linear inside of a block has not as many results as there are tokens."""
        classes = value_of(linear).shape[-1]
        return classes not in self.vocabularies and module_of(linear).startswith(self.prefixes)


def inner_of(model: nn.Module) -> Inner:
    """Return what is inside of the blocks of a model."""
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    prefixes = tuple(f"{name}." for name in blocks(model))
    return Inner(prefixes=prefixes, vocabularies=frozenset(sizes))


def find_heads(graph: GraphModule, outside: bool, inner: Inner) -> tuple[list[Logits], list[str]]:
    """Return the heads of a graph, and the reasons why other Linears before a loss are not heads.

    outside: whether logits that leave the graph count, if they are wider than their inputs.
    """
    found: list[Logits] = []
    reasons: list[str] = []
    for linear in graph.graph.find_nodes(op="call_function", target=functional.linear):
        logits = _follow(linear)
        if isinstance(logits, str):
            reasons += [logits] if logits else []
            continue
        others = [each for each in found if each.wide & logits.wide]
        for other in others:
            found.remove(other)
            logits.heads |= other.heads
            logits.wide |= other.wide
            logits.ends |= other.ends
            logits.leaves |= other.leaves
        found.append(logits)
    return [each for each in found if _is_worth(each, outside, inner)], reasons


def _is_worth(logits: Logits, outside: bool, inner: Inner) -> bool:
    # All of them: LoRA's up-projection alone makes much of little, inside of a block as well.
    wider = all(
        (value_of(head).shape[-1] > value_of(operands(head)[0]).shape[-1]) for head in logits.heads
    )
    if logits.losses:
        return True
    read = bool(logits.ends or (outside and logits.leaves))
    return wider and read and not any(map(inner.holds, logits.heads))


def _follow(linear: Node) -> Logits | str:
    """Return what is done with a Linear's result, or why that is more than logits are for."""
    value, weight = value_of(linear), value_of(operands(linear)[1])
    if not isinstance(value, Tensor) or value.ndim < 2:
        return ""
    logits = Logits(heads={linear}, wide={linear})
    pending, strange = [linear], ""
    while pending:
        node = pending.pop()
        for user in node.users:
            name = name_of(user)
            if user in logits.wide | logits.ends:
                continue
            if user.op == "output":
                logits.leaves = True
            elif name in _NARROW and _is_narrow(user, value.shape[-1]):
                logits.ends.add(user)
            elif name in _WIDE and _is_wide(user, value.shape[-1]) and not user.kwargs.get("out"):
                logits.wide.add(user)
                pending.append(user)
            else:
                strange = name or user.op
    if strange:
        return f"its logits are read by {strange}" if logits.losses else ""
    if isinstance(weight, Tensor) and is_wrapper(weight):
        return "its head is quantised" if logits.losses else ""
    return logits


def _is_narrow(node: Node, classes: int) -> bool:
    """Whether nothing of a result is by class: not a mean over the rows."""
    value = value_of(node)
    return isinstance(value, Tensor) and classes not in value.shape[-1:]


def _is_wide(node: Node, classes: int) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and classes in (*value.shape[-1:], *value.shape[1:2])


def cut_head(graph: GraphModule, logits: Logits, name: str, leave: str, tokens: int | None) -> str:
    """Replace a head, and all that is done with its logits, by one node.

    Returns an empty string, or the reason why this is not possible. name: the name of the submodule
    that the graph gets. leave: what happens to logits that leave the graph, see `on_logits`.
    tokens: the number of rows that are computed at a time; None lets the device decide.
    """
    order = list(graph.graph.nodes)
    members = _closed(order, logits.wide | logits.ends)
    region = Region(members=members)
    read = inputs(region)
    last = max(read)  # fx orders the nodes of a graph by their place
    outside = {user for node in members for user in node.users} - members
    scope = scopes(order)
    if any(user <= last for user in outside):
        return "something reads its loss before all of its logits are there"
    if len({scope[node] for node in (*members, last)}) > 1:
        return "autocast changes between its head and its loss"
    results = escaping(region)
    body = own_graph(read, sorted(members), results)
    for node in body.graph.find_nodes(op="call_function", target=functional.linear):
        node.target = factored
        given = operands(node)
        node.args = (*given, *(None for _ in range(3 - len(given))), tokens)
    body.recompile()
    body.meta |= {"leave": leave, "ends": bool(logits.ends)}
    replace(graph, region, name, body, on_logits, read, results, last)
    return ""


def _closed(order: Sequence[Node], members: set[Node]) -> set[Node]:
    """Return nodes and all that stand between them."""
    after: set[Node] = set()
    for node in order:
        if any(source in members or source in after for source in node.all_input_nodes):
            after.add(node)
    before: set[Node] = set()
    for node in reversed(order):
        if any(user in members or user in before for user in node.users):
            before.add(node)
    return members | (after & before)


def on_logits(body: GraphModule, *given: Any) -> tuple[Any, ...]:
    """Return the results of a graph whose heads make `factored` logits.

    Of logits among them, `body.meta["leave"]` says what becomes: "factored" as they are, "kept"
    computed without gradients, "whole" computed, "none" nothing.
    """
    found, leave = body.forward(*given), body.meta["leave"]
    return tuple(_left(each, leave) if is_factored(each) else each for each in found)


def _left(t: Any, leave: str) -> Any:
    match leave:
        case "factored":
            return t
        case "kept":
            return without_gradients(current(t), count_of(t)).reshape(bare(t))
        case "whole":
            return whole(t)
        case _:
            return None


@lowers(on_logits)
def _lower(body: Body, node: Node) -> None:
    """Let no logits leave that are not plain tensors: a compiler knows no others."""
    where: Any = node.args[0]
    own: Any = body.graph.get_submodule(str(where.target))
    if own.meta["leave"] == "factored":
        own.meta["leave"] = "none" if own.meta["ends"] else "whole"
