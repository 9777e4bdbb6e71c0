"""The generator: uniform, independent, and a function of its labels alone."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from surgery import noise


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
