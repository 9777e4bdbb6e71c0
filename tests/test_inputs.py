"""Inputs of unusual shapes, through every pass that changes what forward keeps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import inputs_of, loss_of, make
from torch import nn
from torch.nn import functional

import passes
import surgery

EXACT: dict[str, list[Any]] = {
    "recompute": [passes.Recompute()],
    "velora": [passes.Velora(groups=8, init="random")],
    "rso": [passes.Rso(rank=8)],
    "galore": [passes.Galore(rank=8, projection="random")],
}
ALL = EXACT | {
    "compress": [passes.Compress()],
    "recompute, compress": [passes.Recompute(), passes.Compress()],
    "galore, recompute": [passes.Galore(rank=8), passes.Recompute()],
    "rso, recompute, compress": [passes.Rso(rank=8), passes.Recompute(), passes.Compress()],
}
INPUTS = {
    "3-D": torch.randn(4, 10, 64),
    "2-D": torch.randn(40, 64),
    "4-D": torch.randn(2, 5, 4, 64),
    "transposed": torch.randn(64, 40).t(),
    "strided": torch.randn(4, 64, 10).transpose(1, 2),
    "expanded": torch.randn(1, 64).expand(40, 64),
    "zero": torch.zeros(40, 64),
    "empty": torch.empty(0, 64),
    "empty 3-D": torch.empty(4, 0, 64),
}


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().sum()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


@pytest.mark.parametrize("row", ALL)
def test_inputs_of_every_shape(row):
    torch.manual_seed(0)
    plain = Chain()
    model = surgery.apply(copy.deepcopy(plain), ALL[row])
    for shape, x in INPUTS.items():
        grads = []
        for each in (plain, model):
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            loss = each(leaf)
            loss.backward()
            grads.append((loss.detach(), leaf.grad))
        (loss, dx), (ours, own) = grads
        torch.testing.assert_close(ours, loss, msg=shape)
        tolerance = 1e-5 if row in EXACT else 0.03
        assert (own - dx).norm() <= tolerance * dx.norm(), shape


@pytest.mark.parametrize(
    "spec",
    [
        [passes.Recompute(), passes.ChunkedLoss()],
        [passes.Velora(groups=4), passes.Recompute(), passes.ChunkedLoss()],
        [passes.Rso(rank=4)],
        [passes.Misa(budget=0.2), passes.Recompute()],
    ],
    ids=lambda spec: ", ".join(one.name for one in spec),
)
def test_a_batch_without_rows(spec):
    model = surgery.apply(make("plain"), spec)
    inputs = inputs_of("plain")
    full = loss_of(model, inputs)
    empty = loss_of(model, {name: value[:0] for name, value in inputs.items()})
    assert empty.isnan()  # as in eager: a mean over nothing
    empty.backward()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    optimizer.step()
    optimizer.zero_grad()
    assert torch.equal(loss_of(model, inputs), full)  # no rows, no gradient, no change
