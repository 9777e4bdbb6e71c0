"""The numbers of zeroth-order directions: keyed by place, whoever asks; and their statistics."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.kernels import directions

KINDS = pytest.mark.parametrize("kind", ["rademacher", "gaussian"])


def splitmix64(place: int, key: int) -> int:
    """The generator's published C code, in Python's integers."""
    word = (1 << 64) - 1
    x = (place * 0x9E3779B97F4A7C15 + key) & word
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
    return x ^ (x >> 31)


@given(place=st.integers(0, 2**40), key=st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_words_are_splitmix64(place, key):
    found = directions.mixed(torch.tensor([place]), key).item() & ((1 << 64) - 1)
    assert found == splitmix64(place, key)


@KINDS
@given(
    start=st.integers(0, 10_000),
    count=st.integers(1, 9_000),
    cut=st.integers(0, 9_000),
    key=st.integers(0, 2**64 - 1),
)
@settings(deadline=None, max_examples=30)
def test_an_entry_depends_on_key_and_place_only(kind, start, count, cut, key):
    whole = directions.direction(kind, 0, start + count, key)[start:]
    assert torch.equal(directions.direction(kind, start, count, key), whole)
    cut = min(cut, count - 1)
    left = directions.direction(kind, start, cut, key) if cut else torch.empty(0)
    right = directions.direction(kind, start + cut, count - cut, key)
    assert torch.equal(torch.cat([left, right]), whole)
    places = torch.arange(start, start + count).flip(0)
    assert torch.equal(directions.direction_at(kind, places, key).flip(0), whole)


def test_signs_take_each_bit_of_a_word_once():
    key = 12345
    signs = directions.direction("rademacher", 0, directions.BLOCK, key)
    ones = sum(splitmix64(place, key).bit_count() for place in range(directions.BLOCK // 64))
    assert int((signs == -1).sum()) == ones
    assert set(signs.tolist()) == {-1.0, 1.0}


@KINDS
def test_entries_are_standard_and_independent(kind):
    n = 1 << 20
    z = directions.direction(kind, 0, n, 7).double()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    fourth = {"rademacher": 1.0, "gaussian": 3.0}[kind]
    assert abs(z.square().mean() - 1) < 5 * math.sqrt(max(fourth - 1, 1e-12) / n) + 1e-12
    assert abs(z.pow(4).mean() - fourth) < 5 * math.sqrt(96 / n)
    for lag in (1, 2, 31, 32, 63, 64, 127, 128, 576, 4096):
        assert abs((z[lag:] * z[:-lag]).mean()) < 5 / math.sqrt(n - lag), lag
    for other in (8, 7 + (1 << 32), 7 ^ (1 << 63)):
        w = directions.direction(kind, 0, n, other).double()
        assert abs((z * w).mean()) < 5 / math.sqrt(n), other


def test_gaussian_entries_have_the_normal_distribution():
    n = 1 << 20
    z = directions.direction("gaussian", 0, n, 3).double().sort().values
    expected = torch.special.ndtr(z)
    seen = (torch.arange(n) + 0.5) / n
    assert (expected - seen).abs().max() < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov, p = 0.001


def test_sixteen_bit_numbers_are_uniform():
    found = directions.sixteen(3, 1 << 20, 9)
    assert torch.equal(directions.sixteen_at(torch.arange(3, 3 + (1 << 20)), 9), found.long())
    counts = torch.bincount(found >> 8, minlength=256).double()
    chi = ((counts - 4096).square() / 4096).sum()
    assert abs(chi - 255) < 5 * math.sqrt(2 * 255)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@KINDS
def test_directions_are_the_same_on_a_gpu_to_the_bit(kind):
    there = directions.direction(kind, 77, 1 << 20, 5, "cuda").cpu()
    assert torch.equal(there, directions.direction(kind, 77, 1 << 20, 5))
    places = torch.arange(0, 1 << 20, 37, device="cuda")
    here = directions.direction_at(kind, places.cpu(), 5)
    assert torch.equal(directions.direction_at(kind, places, 5).cpu(), here)
