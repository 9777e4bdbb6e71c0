"""Optimizers of other packages: the clock hears them; their state is freed, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import PASSES, Moved, own, state_of, weights
from models import inputs_of, loss_of, make

import surgery


def bitsandbytes(parameters: Any) -> Any:
    found = pytest.importorskip("bitsandbytes")
    return found.optim.AdamW8bit(parameters, lr=1e-2, min_8bit_size=1)


def schedulefree(parameters: Any) -> Any:
    optimizer = pytest.importorskip("schedulefree").AdamWScheduleFree(parameters, lr=1e-2)
    optimizer.train()
    return optimizer


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "bitsandbytes 8-bit": bitsandbytes,
    "schedulefree": schedulefree,
    "torch NAdam": lambda parameters: torch.optim.NAdam(parameters, lr=1e-2),
    "torch Muon": lambda parameters: torch.optim.Muon(
        [p for p in parameters if p.ndim == 2], lr=1e-2
    ),
}
CASES = [(kind, row) for kind in OPTIMIZERS for row in ("misa", "rso", "badam")]
CASES.remove(("torch Muon", "badam"))  # it takes matrices only, and blocks have vectors

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def steps(model, optimizer, numbers) -> None:
    for seed in numbers:
        loss_of(model, inputs_of("llama", seed=seed)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("kind", "row"), CASES)
def test_rounds_state_and_resume(kind, row, tmp_path):
    model = surgery.apply(make("llama"), PASSES[row](period=2))
    optimizer = OPTIMIZERS[kind](model.parameters())
    moved = Moved(model, optimizer)
    optimizer.register_step_post_hook(moved.move)
    for step in range(5):
        active = {c.weight for c in surgery.coordinates(model) if c.active}
        before = weights(model)
        steps(model, optimizer, [step])
        for name, parameter in own(model).items():
            torch.testing.assert_close(parameter.detach(), moved.weights[name], msg=name)
            assert torch.equal(parameter, before[name]) == (name not in active), (name, step)
        live = {id(c.parameter) for c in surgery.coordinates(model) if c.active}
        assert {id(p) for p, state in optimizer.state.items() if state} <= live
    assert state_of(model).step == 5
    surgery.save(model, tmp_path, optimizer)
    torch._dynamo.reset()
    again = surgery.apply(make("llama", seed=5), PASSES[row](period=2))
    other = OPTIMIZERS[kind](again.parameters())
    surgery.load(again, tmp_path, other)
    for each in ((model, optimizer), (again, other)):
        steps(*each, range(5, 9))
    for name, parameter in own(model).items():
        assert torch.equal(parameter, own(again)[name]), name


class Elsewhere:
    """An optimizer that is no torch.optim.Optimizer: sign descent."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups = [{"params": list(parameters), "lr": 1e-3}]
        self.state: dict[Any, Any] = {}

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p -= 1e-3 * p.grad.sign()


@pytest.mark.parametrize("row", ["misa", "rso"])
def test_an_optimizer_outside_torch(row):
    model = surgery.apply(make("plain"), PASSES[row](period=2))
    optimizer = Elsewhere(model.parameters())
    before = weights(model)
    for seed in range(4):
        loss_of(model, inputs_of("plain", seed=seed)).backward()
        surgery.step(model, optimizer)
        model.zero_grad()
    assert state_of(model).step == 4
    assert any(not torch.equal(p, before[n]) for n, p in own(model).items())
