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


def came(parameters: Any) -> Any:
    return pytest.importorskip("came_pytorch.CAME").CAME(parameters, lr=1e-2)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "bitsandbytes 8-bit": bitsandbytes,
    "schedulefree": schedulefree,
    "CAME": came,
    "torch NAdam": lambda parameters: torch.optim.NAdam(parameters, lr=1e-2),
    "torch Muon": lambda parameters: torch.optim.Muon(
        [p for p in parameters if p.ndim == 2], lr=1e-2
    ),
}
CASES = [(kind, row) for kind in OPTIMIZERS for row in ("misa", "rso", "badam")]
CASES += [("bitsandbytes 8-bit", row) for row in ("lisa", "velora_redrawn")]
CASES.remove(("torch Muon", "badam"))  # it takes matrices only, and blocks have vectors

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def steps(model, optimizer, numbers) -> None:
    for seed in numbers:
        loss_of(model, inputs_of("plain", seed=seed)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("kind", "row"), CASES)
def test_rounds_state_and_resume(kind, row, tmp_path):
    model = surgery.apply(make("plain"), PASSES[row](period=2))
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
    assert state_of(model).clock.step == 5
    surgery.save(model, tmp_path, optimizer)
    again = surgery.apply(make("plain", seed=5), PASSES[row](period=2))
    other = OPTIMIZERS[kind](again.parameters())
    surgery.load(again, tmp_path, other)
    for each in ((model, optimizer), (again, other)):
        steps(*each, range(5, 9))
    for name, parameter in own(model).items():
        assert torch.equal(parameter, own(again)[name]), name


@pytest.mark.parametrize("row", ["recompute", "chunked_loss", "compress"])
@pytest.mark.parametrize("kind", ["bitsandbytes 8-bit", "schedulefree"])
def test_passes_without_coordinates_do_not_mind_the_optimizer(kind, row):
    start, plain, ours = (make("plain") for _ in range(3))
    surgery.apply(ours, PASSES[row]())
    for model in (plain, ours):
        steps(model, OPTIMIZERS[kind](model.parameters()), range(3))
    bound = 0.5 if row == "compress" else 1e-3  # what rounding at random turns is small entries
    for name, parameter in plain.named_parameters():
        moved = (parameter - start.get_parameter(name)).norm()
        assert (ours.get_parameter(name) - parameter).norm() < bound * moved, name


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
    assert state_of(model).clock.step == 4
    assert any(not torch.equal(p, before[n]) for n, p in own(model).items())


@pytest.mark.parametrize("row", ["misa", "badam", "rso", "velora"])
def test_lomo_steps_inside_of_backward(row):
    """It is SGD, and takes each gradient away as soon as the next one is there."""
    lomo = pytest.importorskip("lomo_optim").Lomo
    spec = PASSES[row](period=2)
    plain, ours = (surgery.apply(make("plain"), spec) for _ in range(2))
    sgd, fused = torch.optim.SGD(plain.parameters(), lr=1e-2), lomo(ours, lr=1e-2)
    for seed in range(5):
        loss_of(plain, inputs_of("plain", seed=seed)).backward()
        sgd.step()
        sgd.zero_grad()
        loss = loss_of(ours, inputs_of("plain", seed=seed))
        surgery.step(ours, fused, lambda loss=loss: fused.fused_backward(loss, 1e-2))
        for name, parameter in own(ours).items():
            torch.testing.assert_close(parameter, own(plain)[name], msg=f"{name} {seed}")
        active = [[c.active for c in surgery.coordinates(model)] for model in (plain, ours)]
        assert active[0] == active[1]
    assert state_of(ours).clock.step == 5


def test_gradients_that_vanish_within_backward_are_told():
    lomo = pytest.importorskip("lomo_optim").Lomo
    model = surgery.apply(make("plain"), "rso", rank=4)
    optimizer = lomo(model, lr=1e-2)
    loss = loss_of(model, inputs_of("plain"))
    with pytest.raises(surgery.OptimizerError, match=r"surgery\.step\(model, optimizer, lambda"):
        optimizer.fused_backward(loss, 1e-2)


def test_optimizers_that_step_inside_of_backward_are_told():
    """The recipe of torch's tutorial: one optimizer for each parameter, stepped by its hook."""
    model = surgery.apply(make("plain"), "badam")
    each = {p: torch.optim.SGD([p], lr=1e-2) for p in model.parameters()}
    before = weights(model)
    for c in surgery.coordinates(model):
        parameter, optimizer = c.parameter, each[c.parameter]
        parameter.register_post_accumulate_grad_hook(lambda _, own=optimizer: own.step())
    with pytest.raises(surgery.OptimizerError, match="SGD steps inside of a backward"):
        loss_of(model, inputs_of("plain")).backward()
    assert all(torch.equal(p, before[n]) for n, p in own(model).items())
