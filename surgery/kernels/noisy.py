"""A weight with noise added to it, never held longer, or larger, than the product that reads it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from surgery.kernels import directions, plan
from surgery.kernels.fused import launch


def noisy(
    weight: Tensor, scale: Tensor, key: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yield W + scale z of a matrix, as bands of rows, each with its place.

    z: normal numbers of variance 1 that depend only on the key and on the place of an entry. scale:
    (rows, 1) or (1, columns). The sum is computed in at least float32 and rounded once to the
    dtype. On a CPU, a band stays in the cache; on an accelerator, one band has all rows, in one
    launch.
    """
    (height, width), device = weight.shape, weight.device
    sizes = plan.plan_of(device)
    if sizes.whole:
        table = directions.table_of("gaussian", device)
        args = (weight, scale, dtype, directions.signed(key), table)
        yield slice(0, height), launch(directions.moved_by, *args)
        return
    for part in plan.bands(height, width, sizes.drawn):
        start, count = part.start * width, (part.stop - part.start) * width
        z = directions.direction("gaussian", start, count, key, device).view(-1, width)
        z = z.to(scale.dtype).mul_(scale[part] if scale.shape[0] > 1 else scale)
        yield part, z.add_(weight[part]).to(dtype)
