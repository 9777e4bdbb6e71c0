"""The strongest directions of a gradient that is never formed: G = a^T b, a sum over rows.

A randomised SVD (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4) wants products of G
with a few vectors only, and (a^T (b V)) is one. Of several processes, the sum of their gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from surgery.ranks import add_up, rank_of_world
from surgery.weights.matrices import wide

MORE = 8  # columns beyond the rank that a randomised SVD works with
_POWERS = 2  # of G G^T that sharpen it
_SHORT = 1 / 8  # of vectors, so that in float16 their products overflow later than R's gradient


def strongest(a: Tensor, b: Tensor, rank: int, normal: Tensor | None) -> Tensor | None:
    """Return the top left singular vectors (channels of a, rank) of G = a^T b, in float32 at least;
    None if G is zero or not finite.

    a, b: rows of one dtype. normal: random numbers (channels of b, rank + MORE or fewer) to start
    from; None means an exact SVD, for which G is formed. If LAPACK's SVD does not converge, which
    happens, a randomised one starts from unit vectors instead. The result is the same to the bit on
    all ranks, and the largest entry of each vector is positive.
    """
    good: list[Tensor] = []

    def summed(part: Tensor) -> Tensor:
        part = part.to(wide(part))
        add_up(part)
        good.append(part.isfinite().all() & part.any())
        return part.nan_to_num_(0.0, 0.0, 0.0)

    found = _exact(summed(a.t() @ b), rank) if normal is None else None
    if found is None:
        width = min(rank + MORE, a.shape[1], b.shape[1])
        start = torch.eye(b.shape[1], width, device=b.device) if normal is None else normal
        found = _randomised(a, b, start / start.norm(dim=0), rank, summed)
    if not bool(torch.stack(good).all()):
        return None
    found *= found.gather(0, found.abs().argmax(0, keepdim=True)).sign()
    if rank_of_world()[0]:
        found.zero_()
    add_up(found)
    return found


def _exact(gradient: Tensor, rank: int) -> Tensor | None:
    try:
        return torch.linalg.svd(gradient, full_matrices=False).U[:, :rank].contiguous()
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        return None


def _randomised(
    a: Tensor, b: Tensor, start: Tensor, rank: int, summed: Callable[[Tensor], Tensor]
) -> Tensor:
    shorter = _SHORT * min(1.0, math.sqrt(a.shape[1] / b.shape[1]))  # G V has few, large entries

    def forth(vectors: Tensor) -> Tensor:
        return summed(a.t() @ (b @ (vectors * shorter).to(b)))

    def back(vectors: Tensor) -> Tensor:
        return summed(b.t() @ (a @ (vectors * _SHORT).to(a)))

    found = _orthonormal(forth(start))
    for _ in range(_POWERS):
        found = _orthonormal(forth(_orthonormal(back(found))))
    rows = back(found)  # G^T Q; the rotation of Q is in its Gram matrix
    rows /= rows.abs().max().clamp(min=torch.finfo(rows.dtype).tiny)  # now it can be squared
    turn = torch.linalg.eigh(rows.t() @ rows).eigenvectors
    return (found @ turn.flip(1)[:, :rank]).contiguous()


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns).Q
