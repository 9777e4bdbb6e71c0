"""The node that a region becomes: cheap operations run again in backward, Linears by hand.

Forward runs the region without autograd and keeps its inputs only. Backward runs the cheap part
again, takes the gradients of each Linear y = x W^T + b as dW = g^T x, dx = g W, db = sum g, with no
second matrix product of the forward, and sends dx through the cheap part with autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.checkpoint import get_device_states, set_device_states

from surgery.compat.autograd import first_order_only
from surgery.graph.linear import input_gradient, linear, rows_of
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
        needed = ctx.needs_input_grad[2:]
        given = [
            value.detach().requires_grad_(need) if isinstance(value, Tensor) else value
            for value, need in zip(inputs[: spec.count], needed, strict=False)
        ]
        wanted = [v for v in given if isinstance(v, Tensor) and v.requires_grad]
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(bool(wanted)))
            _reenter(stack, ctx.autocast, random)
            results = _run(ctx.body, spec, *given)
        back: list[Tensor | None] = [*grads[: spec.escaping]]
        back += [None] * (len(results) - spec.escaping)
        found: list[Tensor | None] = []
        position = spec.count
        for reader, grad in zip(spec.readers, grads[spec.escaping :], strict=True):
            width = 2 if reader.bias else 1
            result = results[reader.source]
            need = (result.requires_grad, *needed[position : position + width])
            if grad is None:
                found += [None] * width
            else:
                dx, *own = _gradients(reader, grad, result.detach(), inputs[position], need)
                found += own[:width]
                held = back[reader.source]
                back[reader.source] = dx if held is None else held if dx is None else held + dx
            position += width
        pairs = [(r, g) for r, g in zip(results, back, strict=True) if r.requires_grad]
        roots = [(r, g) for r, g in pairs if g is not None]
        through: Sequence[Tensor | None] = [None] * len(wanted)
        if wanted and roots:
            ends, ends_grads = zip(*roots, strict=True)
            through = torch.autograd.grad(ends, wanted, ends_grads, allow_unused=True)
        flow = iter(through)
        first = [next(flow) if isinstance(v, Tensor) and v.requires_grad else None for v in given]
        return None, None, *first, *found


def _run(body: GraphModule, spec: Spec, *inputs: Any) -> Sequence[Tensor]:
    """Run a body, compiled on accelerators; not where it draws: compilers draw otherwise."""
    return (body.forward if spec.random else fused.body(body, inputs))(*inputs)


def _gradients(
    reader: Reader, grad: Tensor, x: Tensor, weight: Tensor, need: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Return dx, dW, db of one Linear in the dtype that it computed in, cast back to their own."""
    rows = rows_of(grad)
    dx = dw = db = None
    if need[0]:
        dx = input_gradient(rows, weight, reader.transposed).view(x.shape).to(x.dtype)
    if need[1]:
        features = rows_of(x.to(grad.dtype))
        dw = features.t() @ rows if reader.transposed else rows.t() @ features
        dw = dw.to(weight.dtype)
    if reader.bias and need[2]:
        db = rows.sum(0).to(weight.dtype)
    return dx, dw, db


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
