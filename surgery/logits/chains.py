"""Expressions that are one head and operations by numbers: what the fastest ways are made for."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.nn import functional

from surgery.logits.expression import Expression, Head, Op
from surgery.logits.tiles import each_row_in_tiles

_OPERATORS = {
    "mul": operator.mul,
    "rmul": operator.mul,
    "div": operator.truediv,
    "truediv": operator.truediv,
    "tanh": torch.tanh,
}
_BODIES: dict[tuple[tuple[str, Any], ...], GraphModule] = {}
_FEW = 8  # classes of a row: a kernel has one comparison for each


def chain(root: Expression | None) -> tuple[Head, GraphModule] | None:
    """Return the head and the operations by numbers that lead from it to the logits, if that is
    all that they are."""
    steps: list[tuple[str, Any]] = []
    node: Any = root
    while isinstance(node, Op):
        sources = [each for each in node.args if isinstance(each, Head | Op)]
        numbers = [each for each in node.args if isinstance(each, int | float | torch.dtype)]
        simple = node.name in (*_OPERATORS, "float", "to") and not node.kwargs
        if len(sources) != 1 or not simple or len(numbers) + 1 != len(node.args):
            return None
        steps.append((node.name, numbers[0] if numbers else None))
        node = sources[0]
    if not isinstance(node, Head):
        return None
    body = _chain_of(tuple(reversed(steps)))
    return None if body is None else (node, body)


def under_log_softmax(
    root: Expression, dtypes: Sequence[torch.dtype | None] = (None,)
) -> Expression | None:
    """Return what an expression is the log-softmax of. dtypes: that it may have been asked for."""
    if not isinstance(root, Op) or root.function is not functional.log_softmax:
        return None
    return root.args[0] if root.kwargs.get("dtype") in dtypes else None


def in_tiles(
    root: Op, logits: Expression | None, places: Tensor, used: Tensor | None = None
) -> Tensor | None:
    """Return `each_row_in_tiles`; None: logits are more than a chain, or there is a faster way.

    Where hidden states alone have a gradient, each row's is known from forward on, up to a factor,
    and two products do.
    """
    found = chain(logits) if torch.is_grad_enabled() and places.shape[-1] <= _FEW else None
    if found is None or logits is None:
        return None
    head, body = found
    if not any(t is not None and t.requires_grad for t in (head.weight, head.bias)):
        return None
    return each_row_in_tiles(root, logits, body, places, used)


def _chain_of(steps: tuple[tuple[str, Any], ...]) -> GraphModule | None:
    """Return operations as a graph; None: too many have been asked for, as where a temperature
    changes at each step."""
    if steps not in _BODIES and len(_BODIES) < 32:
        _BODIES[steps] = _body(steps)
    return _BODIES.get(steps)


def _body(steps: tuple[tuple[str, Any], ...]) -> GraphModule:
    graph = Graph()
    value = graph.placeholder("logits")
    for name, number in steps:
        rest = () if number is None else (number,)
        if name in _OPERATORS:
            value = graph.call_function(_OPERATORS[name], (value, *rest))
        else:
            value = graph.call_method(name, (value, *rest))
    graph.output(value)
    return GraphModule(nn.Module(), graph)
