"""Zeroth order: the slope, and the statistics of the estimate."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from laws import method_of
from models import inputs_of, loss_of, make
from torch import nn
from zeroth import ZEROTH, bowl, scalars, sgd, z_of, zeroth

import passes
import surgery
from surgery.testing import Tiny
from surgery.zeroth_order.method import TwoPoint

# -- 10 to 13: the slope ---------------------------------------------------------------------------


SMOOTH = pytest.mark.parametrize(  # each kind on one family, each family by a dense and a thin one
    ("kind", "family"),
    [
        ("mezo", "llama"), ("sparse", "llama"), ("lozo", "llama"),
        ("gaussian", "gpt2"), ("subzero", "gpt2"), ("lozo", "bert"), ("random", "bert"),
    ],
)  # fmt: skip


def true_slope(model: nn.Module, inputs, z: dict[str, torch.Tensor]) -> float:
    twin = copy.deepcopy(surgery.remove(model))
    loss_of(twin, inputs).backward()
    grads = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    return sum(float((grads[n].double() * z[n].double()).sum()) for n in z)


class Smooth(Tiny):
    """Embedding, norms, Linears and a tied head, in float64 throughout."""

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block.down(torch.tanh(block.up(block.norm(x))))
        logits = self.head(x).flatten(0, 1)
        return nn.functional.cross_entropy(logits, targets.flatten())


@zeroth
def test_the_error_of_the_slope_falls_as_eps_squared(kind):
    errors, inputs = [], inputs_of("plain")
    for eps in (4e-3, 2e-3, 1e-3):
        torch.manual_seed(0)
        model = surgery.apply(Smooth().double(), ZEROTH[kind](eps=eps))
        loss_of(model, inputs).backward()
        found, z = scalars(model).grad.item(), z_of(model)
        errors.append(abs(found - true_slope(model, inputs, z)))
    for coarse, fine in itertools.pairwise(errors):
        assert 3.8 < coarse / fine < 4.2, errors


@SMOOTH
def test_the_slope_in_models_of_transformers(kind, family):
    model, inputs = make(family).double().eval(), inputs_of(family)
    surgery.apply(model, ZEROTH[kind](eps=1e-3))
    loss_of(model, inputs).backward()
    found, z = scalars(model).grad.item(), z_of(model)
    expected = true_slope(model, inputs, z)
    assert abs(found - expected) < 0.03 * max(1, abs(expected))


@SMOOTH
def test_the_forward_derivative_is_exact(kind, family):
    for each in ("plain", family):
        model, inputs = make(each).double().eval(), inputs_of(each)
        surgery.apply(model, ZEROTH[kind](estimate="forward"))
        loss = loss_of(model, inputs)
        loss.backward()
        found, z = scalars(model).grad.item(), z_of(model)
        expected = true_slope(model, inputs, z)
        # transformers' norms and losses compute in float32
        tolerance = 1e-10 if each == "plain" else 1e-6
        assert abs(found - expected) < tolerance * max(1, abs(expected))
        with torch.no_grad():
            torch.testing.assert_close(loss_of(model, inputs), loss.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("eps", [1e-3, 0.5, 7.0])
@pytest.mark.parametrize("directions", [1, 3])
def test_quadratic_losses_are_exact_for_any_eps(eps, directions):
    model, (a, b) = bowl()
    surgery.apply(model, passes.Mezo(eps=eps, directions=directions))
    model(a, b).backward()
    found = scalars(model).grad.clone()
    zs = [z_of(model, slot) for slot in range(directions)]
    model = surgery.remove(model)
    model(a, b).backward()
    for slot, z in enumerate(zs):
        slope = (model.matrix.grad * z["matrix"]).sum() + (model.vector.grad * z["vector"]).sum()
        torch.testing.assert_close(found[slot], slope / math.sqrt(directions), rtol=1e-8, atol=1e-8)


def test_one_sided_is_exact_on_linear_losses_and_returns_the_unperturbed_output():
    model, (a, b) = bowl(power=1)
    expected = model(a, b).item()
    surgery.apply(model, passes.Mezo(eps=0.5, estimate="one_sided"))
    loss = model(a, b)
    assert loss.item() == expected
    loss.backward()
    z = z_of(model)
    slope = (a * z["matrix"]).sum() + (b * z["vector"]).sum()
    torch.testing.assert_close(scalars(model).grad[0], slope)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_the_estimate_is_unbiased_with_the_known_variance(kind):
    model, (a, b) = bowl(power=1)
    gradient = torch.cat([a.flatten(), b])
    d, count = gradient.numel(), 2000
    surgery.apply(model, passes.Mezo(noise=kind, eps=0.1))
    optimizer, total, energy = sgd(model, lr=0.0), torch.zeros(d).double(), 0.0
    for _ in range(count):
        model(a, b).backward()
        z = z_of(model)
        estimate = scalars(model).grad * torch.cat([z["matrix"].flatten(), z["vector"]])
        total += estimate
        energy += float(estimate.square().sum())
        optimizer.step()
        optimizer.zero_grad()
    cosine = torch.cosine_similarity(total, gradient, dim=0)
    assert abs(cosine - math.sqrt(count / (count + d + 1))) < 0.02
    along = total @ gradient / gradient.square().sum() / count
    assert abs(along - 1) < 5 * math.sqrt(2 / count)
    expected = {"rademacher": d, "gaussian": d + 2}[kind]
    assert abs(energy / count / float(gradient.square().sum()) / expected - 1) < 0.2


def test_q_directions_have_a_q_fold_smaller_variance():
    model, (a, b) = bowl(power=1)
    gradient = torch.cat([a.flatten(), b])

    def error(directions: int) -> float:
        surgery.apply(model, passes.Mezo(directions=directions, eps=0.1))
        optimizer, found = sgd(model, lr=1.0), []
        for _ in range(400):
            before = torch.cat([model.matrix.detach().flatten(), model.vector.detach()])
            model(a, b).backward()
            optimizer.step()
            optimizer.zero_grad()
            after = torch.cat([model.matrix.detach().flatten(), model.vector.detach()])
            found.append(float((before - after - gradient).square().sum()))
        surgery.remove(model)
        return sum(found) / len(found)

    assert 3.2 < error(1) / error(4) < 4.8


@zeroth
def test_entries_of_every_direction_have_variance_one(kind):
    model = nn.Sequential(nn.Linear(96, 64, bias=False))
    surgery.apply(model, ZEROTH[kind]())
    model(torch.randn(1, 96))
    energy = []
    for _ in range(300):
        z = z_of(model)["0.weight"]
        energy.append(float(z.square().mean()))
        method_of(model, TwoPoint).step += 1
    expected = 0.3 if kind in ("sparse", "random") else 1.0
    error = np.std(energy) / math.sqrt(len(energy))
    error += math.sqrt(0.21 / (96 * 64)) if kind == "random" else 0.0
    assert abs(np.mean(energy) - expected) < 5 * error + 0.01 * expected
