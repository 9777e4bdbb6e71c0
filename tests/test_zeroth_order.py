"""Zeroth order: what an evaluation leaves alone, the mask, the numbers wherever they are used."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from laws import method_of, own, weights
from models import inputs_of, loss_of, make
from torch import nn
from zeroth import ZEROTH, dtypes, scalars, sgd, step, z_of, zeroth

import passes
import surgery
from surgery.testing import Tiny
from surgery.zeroth_order.method import TwoPoint
from surgery.zeroth_order.nodes import perturb_wide

# -- 1: evaluations write nothing ------------------------------------------------------------------


@zeroth
@dtypes
def test_evaluations_leave_every_bit_of_the_weights(kind, dtype):
    model = surgery.apply(make("plain").to(dtype), ZEROTH[kind]())
    before = weights(model)
    loss_of(model, inputs_of("plain")).backward()
    assert all(torch.equal(p, before[n]) for n, p in own(model).items())


@zeroth
def test_evaluations_leave_the_weights_when_the_loss_raises(kind):
    class Failing(Tiny):
        def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            loss = super().forward(tokens, targets)
            self.calls = getattr(self, "calls", 0) + 1
            raise KeyError(f"in evaluation {self.calls} of {loss}")

    model = surgery.apply(Failing(), ZEROTH[kind]())
    before, state = weights(model), torch.get_rng_state()
    with pytest.raises(KeyError):
        loss_of(model, inputs_of("plain"))
    assert all(torch.equal(p, before[n]) for n, p in own(model).items())
    assert torch.equal(torch.get_rng_state(), state)
    assert method_of(model, TwoPoint).shift is None


@pytest.mark.parametrize("kind", ["mezo", "lozo"])
def test_ten_thousand_steps_of_rate_zero_leave_bfloat16_weights(kind):
    model = surgery.apply(nn.Sequential(nn.Linear(8, 4)).bfloat16(), ZEROTH[kind]())
    before, optimizer = weights(model), sgd(model, lr=0.0)
    x = torch.randn(3, 8).bfloat16()
    for _ in range(10_000):
        scalars(model).grad = torch.ones_like(scalars(model))
        optimizer.step()
    model(x).sum().backward()
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in own(model).items())
    assert method_of(model, TwoPoint).step == 10_001


# -- 2 to 4: the mask ------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["magnitude", "random"])
@dtypes
def test_weights_outside_the_mask_are_bit_identical_for_the_whole_run(mask, dtype):
    model = make("plain").to(dtype)
    surgery.apply(model, passes.SparseMezo(keep_fraction=0.25, mask=mask, directions=2))
    loss_of(model, inputs_of("plain"))  # takes the thresholds
    active = {name: z != 0 for name, z in z_of(model).items()}
    start, optimizer = weights(model), sgd(model, lr=0.1)
    for seed in range(20):
        before = weights(model)
        step(model, optimizer, "plain", seed)
        now = {name: z != 0 for name, z in z_of(model).items()}
        for name, parameter in own(model).items():
            frozen = ~active[name]
            assert torch.equal(parameter[frozen], before[name][frozen]), name
            assert not bool((now[name] & frozen).any()), name  # the set only shrinks
            active[name] = now[name]
    assert any(bool((p != start[n]).any()) for n, p in own(model).items())


@pytest.mark.parametrize("mask", ["magnitude", "random"])
def test_the_share_of_a_mask_is_the_one_asked_for(mask):
    keep, n = 0.2, 600 * 512  # larger than the sample that h is taken from
    model = nn.Sequential(nn.Linear(512, 600))
    nn.init.normal_(model[0].weight, std=0.02)
    surgery.apply(model, passes.SparseMezo(keep_fraction=keep, mask=mask))
    model(torch.randn(2, 512))
    z = z_of(model)
    share = (z["0.weight"] != 0).double().mean()
    sampled = 1 << 17 if mask == "magnitude" else n
    assert abs(share - keep) < 3 * math.sqrt(keep * (1 - keep) / sampled)
    assert bool((z["0.bias"] != 0).all())
    if mask == "magnitude":
        weight = model[0].weight.detach().abs()
        assert weight[z["0.weight"] != 0].max() <= weight[z["0.weight"] == 0].min()


def test_both_evaluations_and_the_step_use_one_mask_of_the_unperturbed_weight():
    model = make("plain")
    seen: list[torch.Tensor] = []
    surgery.apply(model, passes.SparseMezo(keep_fraction=0.25, eps=0.05))
    name = "blocks.0.up.weight"
    weight, method = model.get_parameter(name), method_of(model, TwoPoint)
    note = next(p.beside for p in method.weights if p.weight == name)
    band = note._band
    note._band = lambda *args: seen.append(band(*args)) or seen[-1]
    optimizer = sgd(model, lr=0.5)
    before = weight.detach().clone()
    loss_of(model, inputs_of("plain")).backward()
    z = z_of(model)[name]
    optimizer.step()
    plus, minus = seen
    torch.testing.assert_close(plus, before + 0.05 * z, rtol=0, atol=0)
    torch.testing.assert_close(minus, before - 0.05 * z, rtol=0, atol=0)
    moved = weight.detach() != before
    assert torch.equal(moved, z != 0)
    assert torch.equal(z != 0, before.abs() <= note.limit)


def test_keeping_everything_is_mezo_bit_for_bit():
    runs = []
    for options in (passes.SparseMezo(keep_fraction=1.0), passes.Mezo()):
        model = surgery.apply(make("llama"), options)
        optimizer = sgd(model)
        for seed in range(3):
            step(model, optimizer, "llama", seed)
        runs.append(weights(model))
    assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])


def test_a_threshold_is_renewed_each_period():
    model = make("plain")
    surgery.apply(model, passes.SparseMezo(keep_fraction=0.3, threshold="period", period=2))
    optimizer, limits = sgd(model, lr=1e-3), []
    notes = [p.beside for p in method_of(model, TwoPoint).weights if hasattr(p.beside, "limit")]
    for seed in range(6):
        step(model, optimizer, "plain", seed)
        limits.append([note.limit for note in notes])
    assert limits[0] == limits[1] != limits[2] == limits[3] != limits[4]
    fresh = (z_of(model)["blocks.0.up.weight"] != 0).double().mean()
    assert abs(fresh - 0.3) < 0.01


# -- 5, 6: the numbers are the same wherever they are used -----------------------------------------


@zeroth
@pytest.mark.parametrize("shape", [(3,), (5, 3), (7, 130), (33, 64), (4, 6, 10)])
def test_what_is_perturbed_is_what_is_carried(kind, shape):
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(shape))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.weight * x).sum()

    model = surgery.apply(One(), ZEROTH[kind](eps=0.25))
    method = method_of(model, TwoPoint)
    note = method.weights[0].beside
    model(torch.ones(()))
    before = model.weight.detach().clone()
    method.shift = 0.25
    formed = note.perturbed(torch.float32) - before
    method.shift = None
    scalars(model).grad = torch.full_like(scalars(model), -0.25)
    sgd(model, lr=1.0).step()
    torch.testing.assert_close(model.weight.detach() - before, formed, rtol=1e-5, atol=1e-6)


class Words(nn.Module):
    """An embedding that nothing else reads, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 32)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.embed(tokens)).flatten(0, 1)
        return nn.functional.cross_entropy(logits, targets.flatten())


@zeroth
def test_rows_of_an_embedding_get_the_numbers_of_the_whole(kind):
    model = surgery.apply(Words(), ZEROTH[kind](eps=0.1))
    loss_of(model, inputs_of("plain"))
    method = method_of(model, TwoPoint)
    note = next(p.beside for p in method.weights if "embed" in p.weight)
    ids = torch.tensor([5, 0, 5, 31])
    whole = note.rows(0, slice(None))[ids]
    torch.testing.assert_close(note.gather(0, ids), whole, rtol=1e-6, atol=1e-6)


@zeroth
def test_an_embedding_draws_for_the_rows_that_a_batch_reads(kind):
    model = surgery.apply(Words(), ZEROTH[kind](eps=0.1))
    note = next(p.beside for p in method_of(model, TwoPoint).weights if "embed" in p.weight)
    gather, drawn = note.gather, []
    note.gather = lambda slot, ids: drawn.append(len(ids)) or gather(slot, ids)
    note.perturbed = None  # the whole is not to be formed
    loss_of(model, inputs_of("plain")).backward()
    assert drawn == [12, 12]


@zeroth
def test_a_step_touches_no_global_generator(kind):
    model = surgery.apply(make("plain"), ZEROTH[kind]())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    step(model, sgd(model), "plain")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_directions_of_other_weights_steps_and_slots_are_uncorrelated():
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False))
    surgery.apply(model, passes.Mezo(directions=2))
    found = []
    for _ in range(2):
        found += [z for slot in range(2) for z in z_of(model, slot).values()]
        method_of(model, TwoPoint).step += 1
    for i, a in enumerate(found):
        for b in found[:i]:
            assert abs((a * b).mean()) < 5 / 256


@dtypes
def test_an_evaluation_adds_in_float32_and_rounds_once(dtype):
    model = nn.Sequential(nn.Linear(64, 48, bias=False)).to(dtype)
    surgery.apply(model, passes.Mezo())
    method = method_of(model, TwoPoint)
    for shift in (2.0**-7, -(2.0**-7)):
        method.shift = shift
        found = method.weights[0].beside.perturbed(dtype)
        exact = model[0].weight.detach().double() + shift * z_of(model)["0.weight"].double()
        assert torch.equal(found, exact.float().to(dtype))
    method.shift = None


def test_norms_of_half_precision_are_moved_in_float32():
    slopes, inputs = [], inputs_of("llama")
    for dtype in (torch.bfloat16, torch.float32):
        model = make("llama")
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "norm" in name:  # of ones, products would all be rounded back
                parameter.detach().uniform_(0.8, 1.2, generator=generator)
        surgery.apply(model.to(dtype), passes.Mezo(targets=".*norm.*", eps=1e-3))
        # In bfloat16, most entries near 1 stay where they are when 1e-3 is added.
        read = perturb_wide(model.model.norm.weight)
        assert read.dtype == torch.float32
        method_of(model, TwoPoint).shift = 1e-3
        moved = perturb_wide(model.model.norm.weight) - read
        method_of(model, TwoPoint).shift = None
        torch.testing.assert_close(moved.abs(), torch.full_like(moved, 1e-3), rtol=1e-3, atol=0)
        loss_of(model, inputs).backward()
        slopes.append(scalars(model).grad.item())
    assert slopes[0] != 0.0
    assert abs(slopes[0] - slopes[1]) < 0.2
