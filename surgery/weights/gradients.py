"""Norms of gradients, and whether they are finite: the same on all ranks that hold parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from surgery.compat import autograd
from surgery.compat.fsdp import waits
from surgery.kernels.plan import plan_of
from surgery.weights import shards
from surgery.weights.coordinate import Coordinate
from surgery.weights.matrices import wide

_LARGE = 1 << 16  # entries of a gradient above which a call of its own costs nothing


def has_gradient(coordinate: Coordinate, model: nn.Module) -> bool:
    """Whether a backward since the last step has left a gradient, reduced by FSDP2 or not yet."""
    if coordinate.parameter.grad is not None:
        return True
    return coordinate.twin is not None and waits(model, coordinate.twin)


def norms(grads: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the norm of each gradient, of all of it, in float32 (float64 if one is)."""
    if not grads:
        return []
    double = any(grad.dtype == torch.float64 for grad in grads)
    dtype = torch.float64 if double else torch.float32
    own = [_entries(grad) for grad in grads]
    found = autograd.norms(own, dtype)
    cut = [place for place, grad in enumerate(grads) if shards.is_cut(grad)]
    if cut:
        squares = torch.stack([found[place] for place in cut]).square_()
        total = shards.add_up(squares, [grads[place] for place in cut]).sqrt_()
        for place, norm in zip(cut, total.unbind(), strict=True):
            found[place] = norm
    return found


def finite(coordinates: Sequence[Coordinate]) -> bool:
    """Return whether all gradients that are about to be stepped are finite."""
    known: list[Tensor] = []
    changed: list[Tensor] = []
    for each in coordinates:
        grad = each.parameter.grad
        if grad is None or not each.active:
            continue
        if each.norm is not None and each.version == shards.version(grad):
            known.append(each.norm)
        else:
            changed.append(grad)
    own = [_entries(grad) for grad in changed]
    # A sum is finite only if all entries are; on CPU it takes half the time of a norm.
    large = [g for g in own if g.numel() > _LARGE and not plan_of(g.device).whole]
    known += [grad.sum(dtype=wide(grad)) for grad in large]
    summed = {id(grad) for grad in large}
    known += norms([grad for grad in own if id(grad) not in summed])
    devices = {norm.device for norm in known}
    groups = [torch.stack([n for n in known if n.device == d]) for d in devices]
    good = all(bool(group.isfinite().all()) for group in groups)
    cut = [each.parameter for each in coordinates if shards.is_cut(each.parameter)]
    if not cut:
        return good
    bad = torch.tensor([float(not good)], device=cut[0].device)
    return bool((shards.add_up(bad, cut) == 0).all())


def _entries(grad: Tensor) -> Tensor:
    """Return what a rank holds of a gradient; of a sparse one, the entries that are there."""
    own = shards.local(grad)
    return own.coalesce().values() if own.is_sparse else own
