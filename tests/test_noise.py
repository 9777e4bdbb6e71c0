"""The generator: uniform, independent, and a function of its labels alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery import noise
from surgery.kernels import rounding


@given(st.integers(), st.text(), st.integers())
def test_draws_are_functions_of_their_labels(seed, name, period):
    assert noise.bits(seed, name, period) == noise.bits(seed, name, period)
    assert 0.0 < noise.uniform(seed, name, period) < 1.0
    assert math.isfinite(noise.gumbel(seed, name, period))


def test_labels_do_not_run_into_each_other():
    assert noise.bits(0, "ab", "c") != noise.bits(0, "a", "bc")
    assert noise.bits(0, "1", 2) != noise.bits(0, 12)


def test_uniform_has_the_right_distribution():
    draws = [noise.uniform(0, "w", period) for period in range(20_000)]
    for q in (0.01, 0.25, 0.5, 0.75, 0.99):
        share = sum(d < q for d in draws) / len(draws)
        assert abs(share - q) < 5 * math.sqrt(q * (1 - q) / len(draws))
    lagged = sum((a - 0.5) * (b - 0.5) for a, b in itertools.pairwise(draws))
    assert abs(lagged / len(draws)) < 5 / 12 / math.sqrt(len(draws))


def test_gumbel_has_mean_gamma_and_its_variance():
    draws = [noise.gumbel(1, period) for period in range(20_000)]
    mean = sum(draws) / len(draws)
    variance = sum((d - mean) ** 2 for d in draws) / len(draws)
    assert abs(mean - 0.5772) < 0.05 and abs(variance - math.pi**2 / 6) < 0.1


@given(st.lists(st.text(), unique=True), st.integers())
def test_shuffled_does_not_depend_on_the_order_it_is_given(names, seed):
    assert noise.shuffled(names, seed) == noise.shuffled(names[::-1], seed)
    assert sorted(noise.shuffled(names, seed)) == sorted(names)


def test_words_are_functions_of_their_place():
    words = noise.words(100_000, 7, "w")
    assert torch.equal(words[:500], noise.words(500, 7, "w"))
    assert not torch.equal(words, noise.words(100_000, 8, "w"))
    assert int(words.min()) >= 0 and int(words.max()) < 2**32
    for bit in range(32):  # every bit a fair coin, and so is its change from one word to the next
        coins = ((words >> bit) & 1).double()
        for share in (coins.mean(), (coins[1:] != coins[:-1]).double().mean()):
            assert abs(float(share) - 0.5) < 5 * 0.5 / math.sqrt(len(words))


def test_normal_numbers_are_normal_and_finite_for_every_word(monkeypatch):
    drawn = noise.normal((300, 1000), 0, "n").double()
    assert abs(float(drawn.mean())) < 5 / math.sqrt(drawn.numel())
    assert abs(float(drawn.square().mean()) - 1) < 5 * math.sqrt(2 / drawn.numel())
    ends = torch.tensor([0, 2**32 - 1])
    monkeypatch.setattr(noise, "words", lambda *_, **__: ends)
    low, high = noise.normal((2,), 0, "n").tolist()
    assert -7 < low < -6 and low == -high


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_rounding_takes_a_neighbour_and_is_right_on_average(dtype, scale):
    exact = torch.randn(64, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = (exact * scale).float()
    total = torch.zeros(exact.shape, dtype=torch.float64)
    target = torch.empty(exact.shape, dtype=dtype)
    draws = 600
    for step in range(draws):
        words = noise.words(112, 0, "round", step)
        rounding.round_into(target, exact, words[:64], words[64:])
        total += target
        gap = (target.double() - exact).abs()
        spacing = _spacing(exact, dtype)
        assert bool((gap < spacing).all())  # one of the two neighbours, itself if it is one
    error = total / draws - exact
    # the error of the mean has at most spacing / (2 sqrt(draws)) as its deviation
    assert bool((error.abs() < 5.5 * spacing / (2 * math.sqrt(draws))).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1e-1])
def test_a_sum_of_many_steps_is_rounded_once(dtype, scale):
    generator = torch.Generator().manual_seed(0)
    start = (torch.randn(64, 48, generator=generator) * 0.05).to(dtype)
    words = noise.words(112, 0, "round")
    weight, total = start.clone(), torch.zeros(64, 48)
    for _ in range(50):
        exact = rounding.before_rounding(weight, total, words[:64], words[64:])
        total = total + torch.randn(64, 48, generator=generator) * 0.05 * scale
        rounding.round_into(weight, exact + total, words[:64], words[64:])
    unit = torch.maximum(_spacing(start.float(), dtype), _spacing(weight.float(), dtype))
    error = (weight.double() - start.double() - total.double()) / unit
    # Rounded once, the deviation is at most 0.5; rounded in each step, sqrt(50) times as much.
    assert error.square().mean().sqrt() < (0.5 if scale < 0.1 else 1.0)
    assert abs(error.mean()) < 5 * error.std() / math.sqrt(error.numel())


def _spacing(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(exact.abs().double()))
    return 2.0 ** exponent.clamp(min=math.log2(info.tiny)) * info.eps
