"""Outliers of blocks: entries far larger than they are on average (OWL, arXiv 2310.05175)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery.compat.hf import of_adapters
from surgery.errors import TargetError, listed
from surgery.weights import shards
from surgery.weights.modules import is_linear_module, is_matrix, is_transposed
from surgery.weights.targets import blocks


def outliers(
    model: nn.Module, threshold: float, batches: Iterable[Mapping[str, Any]] | None = None
) -> dict[str, float]:
    """Return the share of outliers of each repeated block, over all of its matrices.

    An entry is an outlier if its magnitude is above `threshold` times the mean of the block. With
    batches, each magnitude is first multiplied by the norm of the input of the Linear that it
    multiplies. At least one entry counts as an outlier, so that no share is zero. Adapters are left
    out. On tensors without data, all shares are 1.
    Raises TargetError if a block has no floating-point matrix, or none that has run.
    """
    norms = None if batches is None else _input_norms(model, batches)
    adapters, found, empty = of_adapters(model), {}, []
    for block, names in blocks(model).items():
        weights, scales = [], []
        for name in names:
            owner = name.rpartition(".")[0]
            module = model.get_submodule(owner)
            if not is_matrix(model, name) or module in adapters:
                continue
            if norms is not None and owner in norms:
                scales.append(norms[owner][:, None] if is_transposed(module) else norms[owner])
            if norms is None or owner in norms:
                weights.append(model.get_parameter(name))
        if weights:
            found[block] = _share(weights, threshold, scales)
        else:
            empty.append(block)
    if empty:
        raise TargetError(
            f"outliers: {listed(empty)} has no floating-point matrix whose module has run. Give "
            "some batches that the model takes, or numbers of your own, one for each block."
        )
    return found


@torch.no_grad()
def _share(weights: Sequence[Tensor], threshold: float, scales: Sequence[Tensor]) -> float:
    if any(weight.is_meta for weight in weights):
        return 1.0

    def magnitudes() -> Iterator[Tensor]:
        for place, weight in enumerate(weights):
            own = shards.local(weight.detach()).abs()
            yield own * scales[place] if scales else own

    numel = sum(weight.numel() for weight in weights)
    limit = threshold / numel * _sum(weights, [a.sum(dtype=torch.float64) for a in magnitudes()])
    above = [(a > limit).sum(dtype=torch.float64) for a in magnitudes()]
    return max(_sum(weights, above), 1.0) / numel


def _sum(weights: Sequence[Tensor], values: Sequence[Tensor]) -> float:
    """Return the sum of a number of what this rank holds of each weight, over all that hold it."""
    cut = [place for place, weight in enumerate(weights) if shards.is_cut(weight)]
    total = sum(float(value) for place, value in enumerate(values) if place not in cut)
    if not cut:
        return total
    added = shards.add_up(torch.stack([values[i] for i in cut]), [weights[i] for i in cut])
    return total + float(added.sum())


def _input_norms(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return the norm of each input channel of the Linears that run, by their names."""
    squares: dict[str, Tensor] = {}

    def note(name: str, _: nn.Module, given: tuple[Any, ...]) -> None:
        x = given[0].detach().flatten(0, -2)
        squares[name] = squares.get(name, 0) + x.float().square().sum(0)

    with _evaluating(model), torch.no_grad():
        linears = [(n, m) for n, m in model.named_modules() if is_linear_module(m)]
        hooks = [m.register_forward_pre_hook(partial(note, name)) for name, m in linears]
        try:
            for batch in batches:
                model(**batch)
        finally:
            for hook in hooks:
                hook.remove()
    return {name: square.sqrt() for name, square in squares.items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
