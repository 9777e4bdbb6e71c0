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
from surgery.kernels import fused


class Reader(NamedTuple):
    """A Linear: which result of the body it reads, whether W is (in, out), whether b is given."""

    source: int
    transposed: bool
    bias: bool


class Spec(NamedTuple):
    """A region: its Linears, how many results of its body are used outside, whether the body draws
    random numbers, and how many inputs the body has."""

    readers: tuple[Reader, ...]
    escaping: int
    random: bool
    count: int


def recomputed(body: GraphModule, *inputs: Any) -> tuple[Tensor, ...]:
    """Run a region, `body.meta["spec"]`: inputs of its body, then weight (and bias) of each reader.

    Returns the first `spec.escaping` results of the body, then the readers' results.
    """
    return _Recomputed.apply(body, body.meta["spec"], *inputs)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, body: GraphModule, spec: Spec, *inputs: Any) -> tuple[Tensor, ...]:
        ctx.body, ctx.spec = body, spec
        ctx.plain = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.devices, states = _random_state(inputs) if spec.random else (None, [])
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        ctx.save_for_backward(*states, *tensors)
        ctx.autocast = _autocast_state(inputs)
        results = _run(body, spec, *inputs[: spec.count])
        ctx.dtypes = [result.dtype for result in results]
        weights = iter(inputs[spec.count :])
        outputs = []
        for source, transposed, biased in spec.readers:
            weight, bias = next(weights), next(weights) if biased else None
            outputs.append(linear(results[source], weight, bias, transposed))
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
        needed, own = ctx.needs_input_grad[2:], inputs[: spec.count]
        flows = any(needed[: spec.count])
        compiled = flows and not spec.random and fused.takes(ctx.body, own)
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(flows and not compiled))
            _reenter(stack, ctx.autocast, random)
            if compiled:
                return None, None, *_pulled(ctx.body, spec, inputs, needed, grads, ctx.dtypes)
            given = [
                value.detach().requires_grad_(need) if isinstance(value, Tensor) else value
                for value, need in zip(own, needed, strict=False)
            ]
            results = _run(ctx.body, spec, *given)
        wanted = [v for v in given if isinstance(v, Tensor) and v.requires_grad]
        back: list[Tensor | None] = [*grads[: spec.escaping]]
        back += [None] * (len(results) - spec.escaping)
        found: list[Tensor | None] = []
        for reader, grad, weight, need in _readers(spec, inputs, needed, grads):
            result = results[reader.source]
            if grad is None:
                found += [None] * len(need)
                continue
            if result.requires_grad:
                dx = _input_gradient(reader, grad, weight, result)
                held = back[reader.source]
                back[reader.source] = dx if held is None else held + dx
            found += _own_gradients(reader, grad, result.detach(), weight, need)
        pairs = [(r, g) for r, g in zip(results, back, strict=True) if r.requires_grad]
        roots = [(r, g) for r, g in pairs if g is not None]
        through: Sequence[Tensor | None] = [None] * len(wanted)
        if wanted and roots:
            ends, ends_grads = zip(*roots, strict=True)
            through = torch.autograd.grad(ends, wanted, ends_grads, allow_unused=True)
        flow = iter(through)
        first = [next(flow) if isinstance(v, Tensor) and v.requires_grad else None for v in given]
        return None, None, *first, *found


def _pulled(
    body: GraphModule,
    spec: Spec,
    inputs: Sequence[Any],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
    dtypes: Sequence[torch.dtype],
) -> list[Tensor | None]:
    """Return the gradients of all inputs, with one compiled function for the cheap part: what the
    Linears send back is known before their inputs are computed again. dtypes: of the results."""
    wanted = [i for i in range(spec.count) if needed[i]]
    depends = _depends(body)
    back: dict[int, Tensor] = {i: g for i, g in enumerate(grads[: spec.escaping]) if g is not None}
    ours: set[int] = set()  # not to be written into: what autograd has given
    readers = [*_readers(spec, inputs, needed, grads)]
    for reader, grad, weight, _ in readers:
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
    own = inputs[: spec.count]
    results: Sequence[Tensor]
    found: list[Tensor | None]
    if roots:
        # Popped: of a gated MLP this is the largest tensor here, and not needed for dW.
        results, found = fused.pulled(body, own, wanted, roots, [back.pop(i) for i in roots])
    else:
        results, found = fused.run(body, own), [None] * spec.count
    for reader, grad, weight, need in readers:
        if grad is None:
            found += [None] * len(need)
        else:
            found += _own_gradients(reader, grad, results[reader.source], weight, need)
    return found


def _readers(
    spec: Spec, inputs: Sequence[Any], needed: Sequence[bool], grads: Sequence[Tensor | None]
) -> Iterator[tuple[Reader, Tensor | None, Tensor, Sequence[bool]]]:
    """Return each Linear, the gradient of its result, its weight, and which of its weight and bias
    need theirs."""
    place = spec.count
    for reader, grad in zip(spec.readers, grads[spec.escaping :], strict=True):
        width = 2 if reader.bias else 1
        yield reader, grad, inputs[place], needed[place : place + width]
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


def _input_gradient(reader: Reader, grad: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """Return dx of one Linear, as x."""
    return input_gradient(rows_of(grad), weight, reader.transposed).view(x.shape).to(x.dtype)


def _own_gradients(
    reader: Reader, grad: Tensor, x: Tensor, weight: Tensor, need: Sequence[bool]
) -> list[Tensor | None]:
    """Return dW, and db if there is a bias, in the dtype that the Linear computed in, cast back."""
    rows, dw = rows_of(grad), None
    if need[0]:
        features = rows_of(x.to(grad.dtype))
        dw = features.t() @ rows if reader.transposed else rows.t() @ features
        dw = dw.to(weight.dtype)
    if not reader.bias:
        return [dw]
    return [dw, rows.sum(0).to(weight.dtype) if need[1] else None]


def _random_state(inputs: Sequence[Any]) -> tuple[list[int], list[Tensor]]:
    """Return the devices of the inputs besides the CPU, and the states of the generators."""
    devices, states = get_device_states(*inputs)
    return list(devices), [torch.get_rng_state(), *states]


def _autocast_state(inputs: Sequence[Any]) -> tuple[str, torch.dtype, bool]:
    device = next(value.device.type for value in inputs if isinstance(value, Tensor))
    return device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)


def _reenter(
    stack: ExitStack,
    autocast: tuple[str, torch.dtype, bool],
    random: tuple[Tensor, list[int], list[Tensor]] | None,
) -> None:
    device, dtype, enabled = autocast
    if enabled != torch.is_autocast_enabled(device) or enabled:
        stack.enter_context(torch.autocast(device, dtype, enabled=enabled))
    if random is not None:
        cpu, devices, states = random
        stack.enter_context(torch.random.fork_rng(devices))
        torch.set_rng_state(cpu)
        set_device_states(devices, states)
