"""Carrying the steps of a mapped coordinate into the weight that it stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from surgery import noise
from surgery.kernels import rounding
from surgery.weights import shards
from surgery.weights.coordinate import Coordinate
from surgery.weights.matrices import matrix_shape, wide

CHUNK = 1 << 18  # entries of a 16-bit weight that are rounded at a time: they stay in the cache


@torch.no_grad()
def carry(
    coordinate: Coordinate, weight: Tensor, old: Tensor, new: Tensor, step: int, decay: float = 0.0
) -> None:
    """Take a weight from W0 + map(old) to W0 + map(new), in float32.

    decay: the share of the weight that is taken off before. Into bfloat16 and float16 the sum is
    rounded at random, by numbers that stay the same while W0 does: they tell W0 from the weight, so
    however many steps were made, what is added to W0 is rounded once. With decay W0 changes, and
    each step is rounded by itself, by the number of the optimizer step. Of a weight that FSDP2 has
    cut, a rank carries into what it holds; old and new are whole.
    """
    rule = coordinate.mapped
    assert rule is not None
    (matrix, top, left), (out, width) = shards.part_of(weight), matrix_shape(weight)
    if rule.map.transposed:
        matrix, top, left, out, width = matrix.t(), left, top, width, out
    delta, cut, fp32 = new - old, matrix.shape != (out, width), wide(weight) == weight.dtype
    if decay and fp32:
        matrix *= 1.0 - decay
    if fp32 and not cut:
        rule.map.add_into(matrix, delta)
        return
    if not decay and not bool(delta.any()):
        return
    key = step if decay else rule.since
    both = noise.words(out + width, 0, "carry", coordinate.weight, key, device=weight.device)
    across = slice(left, left + matrix.shape[1])
    rows, columns = both[top:out], both[out:][across]
    fresh = bool(decay) or not bool(old.any())
    height = max(1, CHUNK // width)
    for start in range(0, matrix.shape[0], height):
        part = slice(start, min(start + height, matrix.shape[0]))
        there = slice(top + part.start, top + part.stop)  # in the whole weight
        if fp32:
            matrix[part] += rule.map.change(delta, there)[:, across]
            continue
        if fresh:
            exact = rule.map.change(delta, there)[:, across]
            exact = exact.add_(matrix[part].float(), alpha=1.0 - decay)
        else:
            gone = rule.map.change(old, there)[:, across]
            exact = rounding.before_rounding(matrix[part], gone, rows[part], columns)
            exact += rule.map.change(new, there)[:, across]
        rounding.round_into(matrix[part], exact, rows[part], columns)
