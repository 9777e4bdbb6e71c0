"""What the tests of zeroth-order passes share: the kinds, their directions, dense references."""

from __future__ import annotations

import pytest
import torch
from laws import method_of, own, weights
from models import inputs_of, loss_of
from torch import nn

import passes
import surgery
from surgery.zeroth_order.method import TwoPoint

EPS, RATE = 1e-3, 2e-3
ZEROTH = {
    "mezo": lambda **o: passes.Mezo(**o),
    "gaussian": lambda **o: passes.Mezo(noise="gaussian", **o),
    "sparse": lambda **o: passes.SparseMezo(keep_fraction=0.3, **o),
    "random": lambda **o: passes.SparseMezo(keep_fraction=0.3, mask="random", **o),
    "lozo": lambda **o: passes.Lozo(period=3, **o),
    "subzero": lambda **o: passes.SubZero(rank=4, period=3, **o),
}
zeroth = pytest.mark.parametrize("kind", ZEROTH)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
KINDS_AND_DTYPES = [(kind, torch.float32) for kind in ZEROTH]
KINDS_AND_DTYPES += [(kind, torch.bfloat16) for kind in ("mezo", "sparse", "subzero")]
KINDS_AND_DTYPES += [(kind, torch.float16) for kind in ("mezo", "lozo")]
zeroth_and_dtypes = pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES)


def sgd(model: nn.Module, lr: float = 1e-3, **options) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def scalars(model: nn.Module) -> nn.Parameter:
    return surgery.coordinates(model)[0].parameter


def z_of(model: nn.Module, slot: int = 0) -> dict[str, torch.Tensor]:
    """Every weight's direction, dense."""
    method = method_of(model, TwoPoint)
    e = torch.zeros(scalars(model).numel(), dtype=scalars(model).dtype)
    e[slot] = 1.0 / method.scale
    return {c.weight: c.expand(e) for c in surgery.coordinates(model)}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, family: str, seed: int = 1) -> float:
    loss = loss_of(model, inputs_of(family, seed=seed))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def step_in_parts(model: nn.Module, optimizer, scaler, parts: int, seed: int) -> None:
    """A step of so many micro-batches, under a GradScaler."""
    for part in inputs_of("plain", rows=4, seed=seed)["tokens"].chunk(parts):
        scaler.scale(loss_of(model, {"tokens": part}) / parts).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@torch.no_grad()
def moved(model: nn.Module, change: dict[str, torch.Tensor]) -> nn.Module:
    """Add to each weight, in place."""
    for name, parameter in own(model).items():
        if name in change:
            parameter += change[name]
    return model


@torch.no_grad()
def loss_at(plain: nn.Module, shift: float, z: dict[str, torch.Tensor], inputs) -> float:
    """The loss of a plain model at W + shift z."""
    held = weights(plain)
    loss = loss_of(moved(plain, {n: shift * value for n, value in z.items()}), inputs).item()
    for name, parameter in own(plain).items():
        parameter.copy_(held[name])
    return loss


def slope_of(plain: nn.Module, z: dict[str, torch.Tensor], inputs) -> float:
    return (loss_at(plain, EPS, z, inputs) - loss_at(plain, -EPS, z, inputs)) / (2 * EPS)


def assert_same_weights(model: nn.Module, plain: nn.Module) -> None:
    for name, parameter in own(plain).items():
        torch.testing.assert_close(own(model)[name], parameter, rtol=1e-7, atol=1e-8, msg=name)


class Bowl(nn.Module):
    """A quadratic or a linear loss of a matrix and a vector."""

    def __init__(self, power: int = 2) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 8, dtype=torch.float64))
        self.vector = nn.Parameter(torch.randn(7, dtype=torch.float64))
        self.power = power

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        one, two = self.matrix * a, self.vector * b
        if self.power == 1:
            return one.sum() + two.sum()
        return one.square().sum() + two.square().sum() + one.sum() * two.sum()


def bowl(power: int = 2):
    torch.manual_seed(2)
    model = Bowl(power)
    return model, (torch.randn(6, 8).double(), torch.randn(7).double())
