"""The node that a region becomes: cheap operations run again in backward, Linears by hand.

Forward runs the region without autograd and keeps its inputs only. Backward runs the cheap part
again, takes the gradients of each Linear y = x W^T + b as dW = g^T x, dx = g W, db = sum g, with no
second matrix product of the forward, and sends dx through the cheap part with autograd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import get_device_states, set_device_states

from surgery.compat.autograd import first_order_only
from surgery.graph.linear import add_input_gradient, input_gradient, linear, rows_of
from surgery.graph.reduced import Reduction
from surgery.kernels import fused
from surgery.kernels.autocast import Cast, cast_now
from surgery.weights.sites import trained_by


class Reader(NamedTuple):
    """A Linear: which result of the body it reads, whether W is (in, out), whether b is given,
    whether W's gradient is reduced."""

    source: int
    transposed: bool
    bias: bool
    reduced: bool = False


class Spec(NamedTuple):
    """A region: its Linears, how many results of its body are used outside, whether the body draws
    random numbers, and how many inputs the body has."""

    readers: tuple[Reader, ...]
    escaping: int
    random: bool
    count: int


def recomputed(body: GraphModule, *inputs: Any) -> tuple[Tensor, ...]:
    """Run a region, `body.meta["spec"]`: inputs of its body, then weight (and bias) of each reader,
    then the model's own parameter of each whose weight's gradient is reduced.

    Returns the first `spec.escaping` results of the body, then the readers' results.
    """
    spec: Spec = body.meta["spec"]
    end = len(inputs) - sum(reader.reduced for reader in spec.readers)
    found = [trained_by(place, Reduction) for place in inputs[end:]]
    rules = [None if each is None else each[1] for each in found]
    coordinates = [None if each is None else each[0].read for each in found]
    return _Recomputed.apply(body, spec, rules, *inputs[:end], *coordinates)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, body: GraphModule, spec: Spec, rules: Sequence[Reduction | None], *inputs: Any
    ) -> tuple[Tensor, ...]:
        ctx.body, ctx.spec, ctx.rules = body, spec, rules
        ctx.plain = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.devices, states = _random_state(inputs) if spec.random else (None, [])
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        ctx.save_for_backward(*states, *tensors)
        ctx.autocast = _autocast_state(inputs)
        results = _run(body, spec, *inputs[: spec.count])
        ctx.dtypes = [result.dtype for result in results]
        weights = iter(inputs[spec.count :])
        outputs = []
        for reader in spec.readers:
            weight, bias = next(weights), next(weights) if reader.bias else None
            outputs.append(linear(results[reader.source], weight, bias, reader.transposed))
        return (*results[: spec.escaping], *outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        # Run again under autograd it would be right, but no longer to the order of sums in float32.
        first_order_only("recompute")
        spec: Spec = ctx.spec
        tensors = iter(ctx.saved_tensors)
        random = None
        if ctx.devices is not None:
            random = next(tensors), ctx.devices, [next(tensors) for _ in ctx.devices]
        inputs = [next(tensors) if value is None else value for value in ctx.plain]
        needed, own = ctx.needs_input_grad[3:], inputs[: spec.count]
        readers = [*_readers(spec, ctx.rules, inputs, needed, grads)]
        flows = any(needed[: spec.count])
        compiled = flows and not spec.random and fused.takes(ctx.body, own)
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(flows and not compiled))
            _reenter(stack, ctx.autocast, random)
            if compiled:
                pulled = _pulled(ctx.body, spec, own, needed, grads, ctx.dtypes, readers)
                return None, None, None, *pulled
            given = [
                value.detach().requires_grad_(need) if isinstance(value, Tensor) else value
                for value, need in zip(own, needed, strict=False)
            ]
            results = _run(ctx.body, spec, *given)
        wanted = [v for v in given if isinstance(v, Tensor) and v.requires_grad]
        back: list[Tensor | None] = [*grads[: spec.escaping]]
        back += [None] * (len(results) - spec.escaping)
        for each in readers:
            source, result = each.reader.source, results[each.reader.source]
            if each.grad is not None and result.requires_grad:
                dx = _input_gradient(each, each.grad, result)
                held = back[source]
                back[source] = dx if held is None else held + dx
        found = _own_gradients(readers, [result.detach() for result in results])
        pairs = [(r, g) for r, g in zip(results, back, strict=True) if r.requires_grad]
        roots = [(r, g) for r, g in pairs if g is not None]
        through: Sequence[Tensor | None] = [None] * len(wanted)
        if wanted and roots:
            ends, ends_grads = zip(*roots, strict=True)
            through = torch.autograd.grad(ends, wanted, ends_grads, allow_unused=True)
        flow = iter(through)
        first = [next(flow) if isinstance(v, Tensor) and v.requires_grad else None for v in given]
        return None, None, None, *first, *found


class Turn(NamedTuple):
    """A Linear in one backward: the gradient of its result, its weight, which of its weight and
    bias need theirs, and how the weight's is reduced. `need`: of a reduced weight, its coordinate.
    """

    reader: Reader
    grad: Tensor | None
    weight: Tensor
    need: Sequence[bool]
    rule: Reduction | None


def _pulled(
    body: GraphModule,
    spec: Spec,
    own: Sequence[Any],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
    dtypes: Sequence[torch.dtype],
    readers: Sequence[Turn],
) -> list[Tensor | None]:
    """Return the gradients of all inputs, with one compiled function for the cheap part: what the
    Linears send back is known before their inputs are computed again. own: inputs of the body.
    dtypes: of the results."""
    wanted = [i for i in range(spec.count) if needed[i]]
    depends = _depends(body)
    back: dict[int, Tensor] = {i: g for i, g in enumerate(grads[: spec.escaping]) if g is not None}
    ours: set[int] = set()  # not to be written into: what autograd has given
    for reader, grad, weight, *_ in readers:
        source = reader.source
        if grad is None or not depends[source] & set(wanted):
            continue
        rows = rows_of(grad)
        if source in ours and dtypes[source] == rows.dtype:
            add_input_gradient(rows_of(back[source]), rows, weight, reader.transposed)
            continue
        dx = input_gradient(rows, weight, reader.transposed).to(dtypes[source])
        dx = dx.view(*grad.shape[:-1], -1)
        back[source] = back[source] + dx if source in back else dx
        ours.add(source)
    roots = [i for i in back if depends[i] & set(wanted)]
    results: Sequence[Tensor]
    found: list[Tensor | None]
    if roots:
        # Popped: of a gated MLP this is the largest tensor here, and not needed for dW.
        results, found = fused.pulled(body, own, wanted, roots, [back.pop(i) for i in roots])
    else:
        results, found = fused.run(body, own), [None] * spec.count
    return [*found, *_own_gradients(readers, results)]


def _readers(
    spec: Spec,
    rules: Sequence[Reduction | None],
    inputs: Sequence[Any],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> Iterator[Turn]:
    """Return each Linear's part in a backward. rules: of those whose weight's is reduced."""
    place = spec.count
    reduced = iter(zip(rules, needed[len(inputs) - len(rules) :], strict=True))
    for reader, grad in zip(spec.readers, grads[spec.escaping :], strict=True):
        width = 2 if reader.bias else 1
        weight, need, rule = inputs[place], needed[place : place + width], None
        if reader.reduced:
            rule, own = next(reduced)
            need = (own, *need[1:])
        yield Turn(reader, grad, weight, need, rule)
        place += width


def _depends(body: GraphModule) -> list[frozenset[int]]:
    """Return for each result of a body the places of the inputs that it depends on."""
    known = body.meta.get("depends")
    if known is None:
        found: dict[Node, frozenset[int]] = {}
        for node in body.graph.nodes:
            own = {len(found)} if node.op == "placeholder" else set()
            found[node] = frozenset(own.union(*(found[n] for n in node.all_input_nodes)))
        results: Any = body.graph.output_node().args[0]
        known = body.meta["depends"] = [found[result] for result in results]
    return known


def _run(body: GraphModule, spec: Spec, *inputs: Any) -> Sequence[Tensor]:
    """Run a body, compiled on accelerators; not where it draws: compilers draw otherwise."""
    if spec.random or not fused.takes(body, inputs):
        return body.forward(*inputs)  # no call of a module: hooks on all modules are not meant
    return fused.run(body, inputs)


def _input_gradient(turn: Turn, grad: Tensor, x: Tensor) -> Tensor:
    """Return dx of one Linear, as x."""
    dx = input_gradient(rows_of(grad), turn.weight, turn.reader.transposed)
    return dx.view(x.shape).to(x.dtype)


def _own_gradients(readers: Sequence[Turn], results: Sequence[Tensor]) -> list[Tensor | None]:
    """Return dW, and db if there is a bias, of each Linear, in the dtype that it computed in, cast
    back; then the gradients of the coordinates of those that are reduced."""
    found: list[Tensor | None] = []
    coordinates: list[Tensor | None] = []
    for reader, grad, weight, need, rule in readers:
        dw = db = None
        if grad is not None and need[0]:
            rows, x = rows_of(grad), rows_of(results[reader.source].to(grad.dtype))
            if rule is not None:
                dw = rule.gradient(rows, x)
            else:
                dw = (x.t() @ rows if reader.transposed else rows.t() @ x).to(weight.dtype)
        if grad is not None and reader.bias and need[1]:
            db = rows_of(grad).sum(0).to(weight.dtype)
        found += [None] if reader.reduced else [dw]
        found += [db] if reader.bias else []
        coordinates += [dw] if reader.reduced else []
    return [*found, *coordinates]


def _random_state(inputs: Sequence[Any]) -> tuple[list[int], list[Tensor]]:
    """Return the devices of the inputs besides the CPU, and the states of the generators."""
    devices, states = get_device_states(*inputs)
    return list(devices), [torch.get_rng_state(), *states]


def _autocast_state(inputs: Sequence[Any]) -> Cast:
    return cast_now(next(value.device.type for value in inputs if isinstance(value, Tensor)))


def _reenter(
    stack: ExitStack,
    autocast: Cast,
    random: tuple[Tensor, list[int], list[Tensor]] | None,
) -> None:
    stack.enter_context(autocast.again())
    if random is not None:
        cpu, devices, states = random
        stack.enter_context(torch.random.fork_rng(devices))
        torch.set_rng_state(cpu)
        set_device_states(devices, states)
