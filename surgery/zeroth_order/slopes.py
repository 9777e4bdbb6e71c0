"""Evaluations of one forward at W + s z, and the slopes between what they return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from surgery.weights.matrices import wide
from surgery.zeroth_order.evaluation import Output, Same

if TYPE_CHECKING:
    from surgery.zeroth_order.method import TwoPoint

# The last output, the mid-point of all values, and their slopes for each slot.
Slopes: TypeAlias = tuple[Output, Sequence[Tensor], Sequence[Sequence[Tensor]]]


@torch.no_grad()
def evaluate(method: TwoPoint, run: Same, slots: Sequence[int]) -> Slopes:
    """Return what a training forward gives where nothing is trained by backward."""
    base = method.run_at(None, run) if method.estimate == "one_sided" else None
    last, middles, slopes = base, [], []
    for method.slot in slots:
        last = base  # lets go of the output of the slot before
        if method.estimate == "forward":
            last = _tangent(method, run)
            middles.append(last.values)
            slopes.append(last.slopes)
            continue
        there = method.run_at(method.eps, run).values  # nothing else of this output is kept
        last = base or method.run_at(-method.eps, run)
        slopes.append(_slopes(there, last.values, method.eps if base else 2 * method.eps))
        middles.append([torch.lerp(a, b, 0.5) for a, b in zip(there, last.values, strict=True)])
    assert last is not None
    if base is not None:
        return last, base.values, slopes
    if len(middles) == 1:
        return last, middles[0], slopes
    return last, [torch.stack(each).mean(0) for each in zip(*middles, strict=True)], slopes


def evaluate_beside(method: TwoPoint, run: Same, slots: Sequence[int]) -> Slopes:
    """Return the same where a backward goes through the output at W, which is run last."""
    one = method.estimate == "one_sided"
    with torch.no_grad():
        ends = [method.run_at(method.eps, run).values for method.slot in slots if one]
        slopes = [] if one else evaluate(method, run, slots)[2]
    with torch.enable_grad():
        base = Output(run.last())
    at = [value.detach() for value in base.values]
    return base, base.values, slopes or [_slopes(there, at, method.eps) for there in ends]


def _slopes(there: Sequence[Tensor], here: Sequence[Tensor], distance: float) -> list[Tensor]:
    pairs = zip(there, here, strict=True)
    return [(a.to(wide(a)) - b.to(wide(b))) / distance for a, b in pairs]


def _tangent(method: TwoPoint, run: Same) -> Output:
    """Evaluate the exact directional derivative, by forward-mode differentiation."""
    weight = method.weights[0].parameter
    # Fused attention has no forward-mode derivative.
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        zero = torch.zeros((), device=weight.device, dtype=wide(weight))
        with method.at(forward_ad.make_dual(zero, torch.ones_like(zero))):
            output = Output(run())
        pairs = [forward_ad.unpack_dual(value) for value in output.values]
        output.slopes = [
            torch.zeros_like(value) if tangent is None else tangent.clone()
            for value, tangent in pairs
        ]
        output.values = [value.clone() for value, _ in pairs]
    return output
