"""Copies of weights: taken when they begin to be trained, rounded into the weight, left to rest.

A weight and what is trained of it are held against each other by their versions. What was written
last counts: a step or a change by hand of the coordinate is carried into the weight, at the next
read at the latest; a weight that was written (loaded, averaged) is copied again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from surgery.compat import autograd
from surgery.compat.fsdp import lay
from surgery.compat.tensors import address
from surgery.kernels import plan, rounding
from surgery.kernels.fused import launch
from surgery.weights import shards
from surgery.weights.carry import carry, words_of
from surgery.weights.coordinate import Coordinate, Copied, Mapped, Whole
from surgery.weights.indices import Rows, write_block
from surgery.weights.matrices import matrix_shape, wide
from surgery.weights.sites import Site, fits
from surgery.weights.table import CoordinateTable


def settle(table: nn.Module | None, sites: Iterable[Site], step: int) -> None:
    """Give copies memory that are trained from now on, and take it from those that are not."""
    copies = [(site, each) for site in sites for each in site.coordinates if each.copied]
    moving = [(s, c) for s, c in copies if c.copied and c.copied.resting == c.active]
    for site, each in moving:
        if each.active:
            weight = site.weight()
            _take(each, site.current() if weight is None else weight, step)
            if weight is not None:
                note(each, weight)
        else:
            keep_up(site, each, step)
            assert each.copied is not None
            each.copied.resting, each.seen = True, ()
    if isinstance(table, CoordinateTable) and (moving or len(table.resting) < _resting(copies)):
        table.rest(each for _, each in copies)


def _resting(copies: Iterable[tuple[Site, Coordinate]]) -> int:
    return sum(each.copied is not None and each.copied.resting for _, each in copies)


@torch.no_grad()
def _take(coordinate: Coordinate, weight: Tensor, step: int) -> None:
    rule, part = coordinate.copied, shards.local(coordinate.part(weight))
    assert rule is not None
    dtype = coordinate.parameter.dtype
    dtype = part.dtype if dtype == part.dtype else wide(part)
    own = torch.empty(part.shape, dtype=dtype, device=part.device).copy_(part)
    lay(coordinate.parameter, own)
    rule.since, rule.resting, coordinate.seen = step, False, ()


def note(coordinate: Coordinate, weight: Tensor) -> None:
    """Note that a coordinate and its weight agree."""
    coordinate.seen = (*_seen(coordinate.parameter), *_seen(weight))


def bind(coordinate: Coordinate, weight: Tensor, step: int) -> None:
    """Let a coordinate agree with a weight that may be another object now, or lie elsewhere."""
    rule = coordinate.copied
    if rule is not None and not rule.resting:
        own = coordinate.parameter
        alone = bool(coordinate.seen) and _seen(own) == coordinate.seen[:2]
        if not fits(coordinate, weight):
            _take(coordinate, weight, step)
        elif alone:
            if _seen(weight) != coordinate.seen[2:]:
                shards.take(own, coordinate.part(weight))  # replaced, and nothing else
        elif not _agree(coordinate, weight):
            # Of a copied model: versions tell nothing, and its weights were loaded.
            shards.take(own, coordinate.part(weight))
    note(coordinate, weight)


@torch.no_grad()
def _agree(coordinate: Coordinate, weight: Tensor) -> bool:
    """Whether a weight holds what its copy is, rounded to a neighbour."""
    part, own = shards.local(coordinate.part(weight)), shards.local(coordinate.parameter.detach())
    if part.dtype == own.dtype:
        return torch.equal(part, own)
    near = torch.finfo(part.dtype)
    off = (own - part.to(own.dtype)).abs_()
    return bool((off <= own.abs().mul_(near.eps).add_(near.tiny)).all())


def keep_up(site: Site, coordinate: Coordinate, step: int, wins: bool = False) -> None:
    """Let a coordinate and its weight agree again, if one of them has been written since they did.

    wins: the coordinate counts if both have been. (Whoever writes each parameter by itself writes
    both, and the weight is then what it should be.)
    """
    weight, rule = site.weight(), coordinate.rule
    if weight is None or not coordinate.seen or isinstance(rule, Whole):
        return
    if isinstance(rule, Copied) and rule.resting:
        return
    moved = _seen(coordinate.parameter) != coordinate.seen[:2]
    written = _seen(weight) != coordinate.seen[2:]
    if not moved and not written:
        return
    frozen = coordinate.frozen and isinstance(rule, Mapped)  # it may share what others are moved by
    if moved and (wins or not written) and not frozen:
        write(site, coordinate, step)
    elif isinstance(rule, Copied) and written:
        with torch.no_grad():
            shards.take(coordinate.parameter, coordinate.part(weight))
        note(coordinate, weight)
    else:
        accept(site, coordinate, step)


def keep_all_up(sites: Iterable[Site], step: int, wins: bool = False) -> None:
    """`keep_up` of every coordinate."""
    for site in sites:
        for each in site.coordinates:
            keep_up(site, each, step, wins)


@torch.no_grad()
def take_back(site: Site, coordinate: Coordinate) -> None:
    """Let a coordinate be what its weight holds of it."""
    weight, rule = site.weight(), coordinate.rule
    assert weight is not None
    if isinstance(rule, Copied):
        shards.take(coordinate.parameter, coordinate.part(weight))
    elif isinstance(rule, Mapped):
        own = coordinate.parameter
        own.zero_() if rule.carried is None else own.copy_(rule.carried)
    note(coordinate, weight)


def accept(site: Site, coordinate: Coordinate, step: int) -> None:
    """Take what a coordinate is now for what its weight holds of it."""
    rule, weight = coordinate.mapped, site.weight()
    if weight is None:
        return
    if rule is not None:
        began = rule.since == step  # from zero
        rule.carried = None if began else coordinate.parameter.detach().clone()
    if not (coordinate.copied and coordinate.copied.resting):
        note(coordinate, weight)


@torch.no_grad()
def write(
    site: Site,
    coordinate: Coordinate,
    step: int,
    decay: float = 0.0,
    taken: dict[int, Tensor] | None = None,
) -> None:
    """Take what a coordinate has become into its weight. decay: see `carry`. taken: what parameters
    have become, by id; filled. Several weights may share one."""
    taken = {} if taken is None else taken
    weight, rule = site.weight(), coordinate.rule
    assert weight is not None
    before = _seen(weight)
    match rule:
        case Copied():
            _round_into(coordinate, weight, rule)
        case Mapped():
            now = coordinate.parameter.detach()
            old = None if rule.carried is None else shards.whole(rule.carried).to(now.device)
            new = shards.whole(now)
            if not site.unused:
                carry(coordinate, weight, old, new, step, decay)
            if id(coordinate.parameter) not in taken:
                taken[id(coordinate.parameter)] = now.clone()
            rule.carried = taken[id(coordinate.parameter)]
        case Whole():
            return
    note(coordinate, weight)
    for other in site.coordinates:  # they are of other parts of the weight
        if other.seen[2:] == before:
            other.seen = (*other.seen[:2], *coordinate.seen[2:])


def _round_into(coordinate: Coordinate, weight: Tensor, rule: Copied) -> None:
    part, now = shards.local(coordinate.part(weight)), shards.local(coordinate.parameter.detach())
    _rounded(coordinate, weight, rule, part, now)
    if isinstance(rule.index, Rows):  # of which a part is a copy
        write_block(weight.detach(), rule.index, part)


def _rounded(
    coordinate: Coordinate, weight: Tensor, rule: Copied, part: Tensor, now: Tensor
) -> None:
    """Let a part of a weight be what its copy is now, rounded."""
    (height, width), top, left = matrix_shape(coordinate.parameter), 0, 0
    if shards.is_cut(weight):  # as a whole: blocks of it are refused
        _, top, left = shards.part_of(weight)
    if part.dtype == now.dtype or not now.numel():  # of a short vector, a rank may hold nothing
        part.copy_(now)
        return
    exact, sizes = now.reshape(-1, part.shape[-1] if part.ndim else 1), plan.plan_of(part.device)
    flat = part.ndim == 2 or part.is_contiguous()
    rounded = part.view(exact.shape) if part.is_contiguous() else part
    if not flat:  # a convolution in channels_last
        rounded = torch.empty_like(exact, dtype=part.dtype)
    both = words_of(coordinate, part, height + width, rule.since, sizes.whole)
    down, across = both[top:height], both[height + left :][: exact.shape[1]]
    for rows in plan.bands(exact.shape[0], width, sizes.carried):
        launch(rounding.round_into, rounded[rows], exact[rows], down[rows], across)
    if not flat:
        part.copy_(rounded.view(part.shape))


def _seen(t: Tensor) -> tuple[int, int]:
    own = shards.local(t)
    return autograd.version(own), address(own)
