"""Carrying the steps of a mapped coordinate into the weight that it stands for."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from surgery import noise
from surgery.kernels import plan, rounding
from surgery.kernels.fused import launch
from surgery.weights import shards
from surgery.weights.coordinate import Coordinate
from surgery.weights.matrices import matrix_shape, wide

# The words of a coordinate's round, on accelerators: of its rows and columns.
_WORDS: weakref.WeakKeyDictionary[Coordinate, tuple[int, Tensor]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def carry(
    coordinate: Coordinate,
    weight: Tensor,
    old: Tensor | None,
    new: Tensor,
    step: int,
    decay: float = 0.0,
) -> None:
    """Take a weight from W0 + map(old) to W0 + map(new), in float32.

    old: None where a round begins, from zero. decay: the share of the weight that is taken off
    before. Into bfloat16 and float16 the sum is
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
    sizes = plan.plan_of(weight.device)
    delta = new if old is None else new - old
    cut, fp32 = matrix.shape != (out, width), wide(weight) == weight.dtype
    if decay and fp32:
        matrix *= 1.0 - decay
    if fp32 and not cut:
        pure = rule.map.pure() if sizes.whole else None
        if pure is None:
            rule.map.add_into(matrix, delta)
        else:
            launch(rounding.added, matrix, delta, *pure)
        return
    if not sizes.whole and not decay and not bool(delta.any()):
        return
    across = slice(left, left + matrix.shape[1])
    both = words_of(coordinate, matrix, out + width, step if decay else rule.since, sizes.whole)
    rows, columns = both[top:out], both[out:][across]
    fresh = bool(decay) or old is None or (not sizes.whole and not bool(old.any()))
    gone = None if fresh else old
    new = delta if fresh else new
    keep = torch.full((), 1.0 - decay, device=weight.device) if decay else None
    if sizes.whole and not fp32 and not cut and (pure := rule.map.pure()) is not None:
        launch(rounding.carried_by, matrix, gone, new, keep, both, *pure)
        return
    for part in plan.bands(matrix.shape[0], width, sizes.carried):
        there = slice(top + part.start, top + part.stop)  # in the whole weight
        if fp32:
            matrix[part] += rule.map.change(delta, there)[:, across]
            continue
        before = None if gone is None else rule.map.change(gone, there)[:, across]
        change = rule.map.change(new, there)[:, across]
        launch(rounding.carried, matrix[part], before, change, keep, rows[part], columns)


def words_of(coordinate: Coordinate, like: Tensor, count: int, key: int, keep: bool) -> Tensor:
    """Return the words that round a coordinate's steps. keep: for its round, 8 bytes each."""
    found = _WORDS.get(coordinate)
    if found is None or found[0] != key or found[1].device != like.device:
        word = noise.bits(0, "carry", coordinate.key, key)
        drawn = launch(rounding.words, like, count, word & 0xFFFFFFFF, word >> 32)
        if not keep:
            return drawn
        found = _WORDS[coordinate] = (key, drawn)
    return found[1]
