"""Drawing within a hard budget: no favourites by size, full coverage, importance in between."""

from __future__ import annotations

import collections
import functools
import math
import re
import statistics

import pytest
import torch
import transformers
from models import make
from torch import nn

import passes
import surgery
from passes.misa import Draw
from surgery.sampling.budget import BudgetSampler
from surgery.sampling.rounds import Rounds, whole_blocks


@functools.cache
def skeleton(kind: str) -> nn.Module:
    """The real shapes of a large model, without memory."""
    common = dict(tie_word_embeddings=False)
    config = {
        "llama-3-8b": transformers.LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            **common,
        ),
        "qwen2.5-7b": transformers.Qwen2Config(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            **common,
        ),
    }[kind]
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def sampler_of(kind: str, budget: float, seed: int = 0, **options) -> BudgetSampler:
    method = passes.Misa(budget=budget, seed=seed, **options).start(skeleton(kind))
    assert isinstance(method.draw, Draw)
    fresh = method.draw.sampler
    fresh.visited.clear()
    fresh.waiting.clear()
    return fresh


@pytest.mark.parametrize("kind", ["llama-3-8b", "qwen2.5-7b"])
@pytest.mark.parametrize("budget", [0.01, 0.03])
def test_equal_scores_give_equal_inclusion(kind, budget):
    sampler = sampler_of(kind, budget)
    equal = dict.fromkeys(sampler.sizes, 0.0)
    visits: collections.Counter[str] = collections.Counter()
    rounds, used = 2000, 0
    for round in range(rounds):
        drawn = sampler.draw(round, equal)
        size = sum(sampler.sizes[name] for name in drawn)
        assert drawn and len(set(drawn)) == len(drawn) and size <= sampler.limit
        visits.update(drawn)
        used += size
    # By kind of matrix: the bias of the published rule is one of size. The blocks are alike.
    kinds = collections.defaultdict(list)
    for name in sampler.sizes:
        kinds[re.findall(r"\w+_proj", name)[0]].append(visits[name])
    means = [statistics.fmean(counts) for counts in kinds.values()]
    assert len(means) == 7 and max(means) / min(means) < 1.15
    assert max(visits.values()) / min(visits.values()) < 1.5 + noise_of(min(visits.values()))
    assert used > 0.8 * rounds * sampler.limit


def noise_of(count: int) -> float:
    """Spread of a ratio of two counts among a few hundred of this size, by chance alone."""
    return 6 / math.sqrt(count)


@pytest.mark.parametrize("span", [None, 1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_every_module_is_visited_within_the_documented_bound(span, seed):
    sampler = sampler_of("llama-3-8b", 0.03, seed=seed, span=span)
    # The worst case: p says never, for all but one block.
    skewed = {n: 0.0 if sampler.places[n] == 5 else -1e9 for n in sampler.sizes}
    last = dict.fromkeys(sampler.sizes, -1)
    worst = 0
    for round in range(3 * sampler.coverage):
        for name in sampler.draw(round, skewed):
            worst = max(worst, round - last[name])
            last[name] = round
    assert min(last.values()) >= 0
    assert worst <= sampler.coverage


def test_importance_prevails_within_the_bound():
    sampler = sampler_of("llama-3-8b", 0.03)
    favoured = {n: 2.0 if sampler.places[n] == 7 else 0.0 for n in sampler.sizes}
    visits: collections.Counter[int] = collections.Counter()
    for round in range(400):
        visits.update(sampler.places[n] for n in sampler.draw(round, favoured))
    others = [count for block, count in visits.items() if block != 7]
    assert visits[7] > 3 * max(others)


@pytest.mark.parametrize("span", [1, 2, 5])
def test_span_keeps_a_round_within_neighbouring_blocks(span):
    sampler = sampler_of("llama-3-8b", 0.03, span=span)
    for round in range(200):
        drawn = {sampler.places[n] for n in sampler.draw(round, dict.fromkeys(sampler.sizes, 0.0))}
        assert max(drawn) - min(drawn) < span


def test_first_draws_follow_p():
    sizes = dict.fromkeys("abcd", 10)
    log_p = {n: math.log(p) for n, p in zip("abcd", (0.1, 0.2, 0.3, 0.4), strict=True)}
    places = dict.fromkeys("abcd", 0)
    first: collections.Counter[str] = collections.Counter()
    draws = 20_000
    for seed in range(draws):
        sampler = BudgetSampler(sizes=sizes, limit=20, seed=seed, places=places)
        first[sampler.draw(0, log_p)[0]] += 1
    square = sum(
        (first[n] - draws * math.exp(p)) ** 2 / (draws * math.exp(p)) for n, p in log_p.items()
    )
    assert square < 16.3  # chi-square with 3 degrees of freedom, 0.1 %


def test_what_was_learned_has_a_name_of_its_own():
    """Else a save would fail, or overwrite the count of rounds."""
    model = make("plain")
    units, _ = whole_blocks(model, None, "mine")
    for learned in ((object(),), {"round": object()}):
        with pytest.raises(surgery.OptionError, match=r'learned=.*\{"scores": scores\}'):
            Rounds(
                name="mine",
                units=units,
                period=1,
                draw=lambda round: [*units],
                total=1,
                learned=learned,  # pyright: ignore[reportArgumentType]
            )
