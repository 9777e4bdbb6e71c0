"""Zeroth order: the updates of arXiv 2402.11592, beside its equations written densely."""

from __future__ import annotations

import math

import pytest
import torch
from laws import method_of, own, weights
from models import inputs_of, loss_of, make
from torch import nn
from zeroth import (
    EPS,
    RATE,
    ZEROTH,
    assert_same_weights,
    loss_at,
    moved,
    scalars,
    sgd,
    slope_of,
    step_in_parts,
    z_of,
)

import passes
import surgery
from surgery.zeroth_order.method import TwoPoint

# -- sign ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mezo", "sparse", "random"])
@pytest.mark.parametrize("make_optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.filterwarnings("ignore:mezo.*has momentum", "ignore:sparse_mezo.*has momentum")
def test_sign_steps_are_those_of_the_paper(kind, make_optimizer):
    model, plain = make("plain").double(), make("plain").double()
    surgery.apply(model, ZEROTH[kind](eps=EPS, update="sign"))
    optimizer = make_optimizer(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for seed in range(5):
        inputs = inputs_of("plain", seed=seed)
        loss_of(model, inputs).backward()
        z, rate = z_of(model), schedule.get_last_lr()[0]
        g = slope_of(plain, z, inputs)
        moved(plain, {n: -rate * (g * value).sign() for n, value in z.items()})
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        assert_same_weights(model, plain)


def test_a_sign_of_accumulated_and_scaled_slopes_is_that_of_their_sum():
    runs = []
    for parts, fused in ((1, False), (4, False), (4, True)):
        model = surgery.apply(make("plain"), passes.Mezo(update="sign", weight_decay=0.5))
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=parts > 1)
        for seed in range(4):
            step_in_parts(model, optimizer, scaler, parts, seed)
        runs.append(weights(model))
        again = surgery.apply(make("plain"), passes.Mezo(update="sign", weight_decay=0.5))
        surgery.replay(again, surgery.journal(model))
        assert all(torch.equal(p, runs[-1][n]) for n, p in own(again).items())
    for run in runs[1:]:
        for name, value in runs[0].items():
            torch.testing.assert_close(run[name], value, rtol=1e-6, atol=1e-7)


def test_a_sign_step_with_a_slope_that_is_not_finite_changes_nothing():
    model = surgery.apply(make("plain"), passes.Mezo(update="sign"))
    optimizer, before = sgd(model), weights(model)
    (loss_of(model, inputs_of("plain")) * math.inf).backward()
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in own(model).items())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mezo", {"directions": 2}), ("mezo", {"noise": "gaussian"}), ("mezo", {"dense": True}),
        ("lozo", {}), ("subzero", {}),
    ],
)  # fmt: skip
def test_signs_that_one_scalar_cannot_carry_are_refused(name, options):
    with pytest.raises(surgery.OptionError, match=r"one scalar for each .*p\.grad\.sign_\(\)"):
        surgery.apply(make("plain"), name, update="sign", **options)


@pytest.mark.parametrize("kind", ["gaussian", "lozo"])
def test_signs_of_dense_gradients_are_taken_in_the_loop(kind):
    model, probe = make("plain"), make("plain")
    surgery.apply(model, ZEROTH[kind](dense=True, directions=2))
    surgery.apply(probe, ZEROTH[kind](directions=2))
    before, inputs = weights(model), inputs_of("plain")
    for each in (model, probe):
        loss_of(each, inputs).backward()
    g = scalars(probe).grad
    assert g is not None
    for p in [p for p in model.parameters() if p.grad is not None]:
        p.grad.sign_()
    sgd(model, lr=RATE).step()
    for c in surgery.coordinates(probe):
        expected = before[c.weight] - RATE * c.expand(g).view_as(before[c.weight]).sign()
        torch.testing.assert_close(own(model)[c.weight], expected, rtol=1e-6, atol=1e-7)


# -- conservative ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ZEROTH)
@pytest.mark.parametrize("blocks", [None, 2])
def test_a_conservative_step_ends_at_the_best_of_three(kind, blocks):
    model, plain = make("plain").double(), make("plain").double()
    surgery.apply(model, ZEROTH[kind](eps=EPS, update="conservative", blocks=blocks))
    optimizer, inputs = sgd(model, lr=1.0), inputs_of("plain")
    taken = []
    for rate in [0.01, 0.1, 0.3, 1.0] * 5:
        optimizer.param_groups[0]["lr"] = rate
        active = {c.weight for c in surgery.coordinates(model) if c.active}
        loss = loss_of(model, inputs)
        loss.backward()
        z = {name: value for name, value in z_of(model).items() if name in active}
        g, before = slope_of(plain, z, inputs), weights(model)
        ends = {share: loss_at(plain, -share * rate * g, z, inputs) for share in (0, 1, -1)}
        best = min(ends, key=ends.__getitem__)
        moved(plain, {n: -best * rate * g * value for n, value in z.items()})
        optimizer.step()
        optimizer.zero_grad()
        taken.append(best)
        assert_same_weights(model, plain)
        if best == 0:
            assert all(torch.equal(p, before[n]) for n, p in own(model).items())
        with torch.no_grad():
            assert loss_of(model, inputs).item() <= ends[0] + 1e-9
    assert len(set(taken)) > 1, taken
    steps = surgery.journal(model)
    assert [float(x) == 0 for x in steps[:, 0]] == [best == 0 for best in taken]
    start = surgery.apply(
        make("plain").double(), ZEROTH[kind](eps=EPS, update="conservative", blocks=blocks)
    )
    surgery.replay(start, steps)
    assert all(torch.equal(p, own(model)[n]) for n, p in own(start).items())


def test_a_conservative_step_is_judged_by_all_micro_batches_as_backward_weighs_them():
    runs = []
    for parts, scale in ((1, None), (4, None), (4, 1024.0)):
        model = surgery.apply(make("plain").double(), passes.Mezo(update="conservative"))
        optimizer = sgd(model, lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for seed in range(8):
            loss_of(model, inputs_of("plain", seed=99)).backward()  # and thrown away
            optimizer.zero_grad()
            step_in_parts(model, optimizer, scaler, parts, seed)
        runs.append((weights(model), surgery.journal(model)))
    shares = [[float(x) == 0 for x in steps[:, 0]] for _, steps in runs]
    assert shares[0] == shares[1] == shares[2] and {*shares[0]} == {True, False}
    for run, _ in runs[1:]:
        for name, value in runs[0][0].items():
            torch.testing.assert_close(run[name], value, rtol=1e-5, atol=1e-6)


class Noisy(nn.Module):
    """A loss with dropout and batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.dropout(self.norm(self.first(x)), 0.5)
        return nn.functional.mse_loss(self.last(hidden), y)


@pytest.mark.parametrize("cast", [False, True])
def test_a_judged_step_sees_the_masks_of_its_forwards_and_leaves_no_trace(cast):
    model = surgery.apply(Noisy().train(), passes.Mezo(update="conservative", eps=1e-3))
    method = method_of(model, TwoPoint)
    optimizer, losses = sgd(model, lr=0.0), []
    x, y = torch.randn(4, 8), torch.randn(4, 1)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            loss = model(x, y)
        loss.backward()
        method.weights[0].parameter.grad.fill_(0.1)
        judged, kept = method.judged, [*method.judged.kept]
        assert len(kept) == 1
        with torch.no_grad():
            losses.append((judged._loss_at(None).item(), loss.item()))
        state, buffers = torch.get_rng_state(), {n: b.clone() for n, b in model.named_buffers()}
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
        assert not judged.kept
        optimizer.zero_grad()
    for found, loss in losses:
        assert found == pytest.approx(loss, rel=2e-2 if cast else 1e-4)
    assert losses[0] != losses[1]


def test_losses_that_cannot_be_compared_are_refused():
    model = surgery.apply(nn.Sequential(nn.Linear(4, 1)), "mezo", update="conservative")
    with pytest.raises(surgery.ModelError, match=r"mezo: .*not returned a loss.*output\.loss"):
        model(torch.randn(1, 4))
    model = surgery.apply(make("plain"), "mezo", update="conservative")
    optimizer, before = sgd(model), weights(model)
    scalars(model).grad = torch.ones(1)
    with pytest.raises(surgery.OptimizerError, match=r"set by hand.*loss\.backward\(\)"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in own(model).items())
    for options in ({"directions": 2}, {"dense": True}):
        with pytest.raises(surgery.OptionError, match="along one direction"):
            surgery.apply(make("plain"), "lozo", update="conservative", **options)
    with pytest.raises(surgery.OptionError, match=r"weight_decay=0\.1: the weights that are"):
        surgery.apply(make("plain"), "mezo", update="conservative", weight_decay=0.1)


def test_a_conservative_step_that_is_not_finite_is_not_made():
    model = surgery.apply(make("plain"), "mezo", update="conservative")
    optimizer, before = sgd(model), weights(model)
    for factor in (math.inf, math.nan):
        (loss_of(model, inputs_of("plain")) * factor).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(p, before[n]) for n, p in own(model).items())
    optimizer.param_groups[0]["lr"] = 1e30
    loss_of(model, inputs_of("plain")).backward()
    optimizer.step()  # its ends are not finite, or worse
    assert all(torch.equal(p, before[n]) for n, p in own(model).items())
