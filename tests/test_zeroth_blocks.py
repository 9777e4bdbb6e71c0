"""Zeroth order, block-wise (arXiv 2402.11592): directions through neighbouring blocks in turn."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from laws import own, weights
from models import inputs_of, loss_of, make
from zeroth import (
    EPS,
    RATE,
    ZEROTH,
    assert_same_weights,
    dtypes,
    moved,
    sgd,
    slope_of,
    step,
    z_of,
    zeroth,
)

import passes
import surgery
from surgery.zeroth_order.options import neighbours


def test_neighbours_are_the_blocks_and_what_lies_between():
    model = make("llama")
    runs = neighbours(model, [name for name, _ in model.named_parameters()])
    layers = [f"model.layers.{i}." for i in range(len(model.model.layers))]
    assert runs[0] == ["model.embed_tokens.weight"]
    for prefix, run in zip(layers, runs[1:], strict=False):
        assert len(run) == 9 and all(name.startswith(prefix) for name in run)
    assert len(runs) == len(layers) + 2 and runs[-1][0] == "model.norm.weight"
    inner = neighbours(model, ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
    assert [len(run) for run in inner] == [1, 1]


@pytest.mark.parametrize(("blocks", "directions"), [(1, 1), (2, 1), (1, 2), (1, 4), (2, 4)])
@pytest.mark.parametrize("kind", ["mezo", "sparse", "lozo", "subzero"])
def test_a_step_probes_and_moves_the_next_blocks(kind, blocks, directions):
    model, plain = make("plain").double(), make("plain").double()
    options = {"eps": EPS, "blocks": blocks, "directions": directions}
    surgery.apply(model, ZEROTH[kind](**options))
    runs = neighbours(plain, list(own(plain)))
    assert len(runs) == 4  # embedding, three blocks
    groups = [[*itertools.chain(*runs[at : at + blocks])] for at in range(0, 4, blocks)]
    optimizer = sgd(model, lr=RATE)
    for number in range(5):
        inputs, change = inputs_of("plain", seed=number), {}
        turns = [(number * directions + slot) % len(groups) for slot in range(directions)]
        trained = {name for turn in turns for name in groups[turn]}
        assert {c.weight for c in surgery.coordinates(model) if c.active} == trained
        loss_of(model, inputs).backward()
        before = weights(model)
        for slot, turn in enumerate(turns):
            z = {name: z_of(model, slot)[name] for name in groups[turn]}
            g = slope_of(plain, z, inputs)
            for name, value in z.items():  # averaged over the directions of a group
                step_of = -RATE * g * value / max(1, directions / len(groups))
                change[name] = change.get(name, 0) + step_of
        moved(plain, change)
        optimizer.step()
        optimizer.zero_grad()
        assert_same_weights(model, plain)
        for name, value in before.items():
            assert torch.equal(own(model)[name], value) != (name in trained), name


@zeroth
@dtypes
def test_a_run_in_blocks_replays_and_goes_on(kind, dtype, tmp_path):
    options = ZEROTH[kind](blocks=1, directions=3)
    model = surgery.apply(make("plain").to(dtype), options)
    optimizer = sgd(model)
    for seed in range(3):
        step(model, optimizer, "plain", seed)
    surgery.save(model, tmp_path, optimizer)
    resumed = surgery.apply(make("plain").to(dtype), options)
    again = sgd(resumed)
    surgery.load(resumed, tmp_path, again)
    for seed in range(3, 6):
        step(model, optimizer, "plain", seed)
        step(resumed, again, "plain", seed)
    replayed = surgery.replay(
        surgery.apply(make("plain").to(dtype), options), surgery.journal(model)
    )
    for name, value in own(model).items():
        assert torch.equal(own(resumed)[name], value), name
        assert torch.equal(own(replayed)[name], value), name


def test_blocks_of_signs_and_dense_blocks():
    """Each direction has its own blocks, so signs of several are carried; dense state leaves."""
    model = surgery.apply(make("plain"), passes.Mezo(update="sign", blocks=2, directions=2))
    before = weights(model)
    step(model, sgd(model, lr=RATE), "plain")
    for name, value in before.items():
        off = (own(model)[name].detach() - value).abs()
        torch.testing.assert_close(off, torch.full_like(off, RATE), rtol=1e-3, atol=1e-7)
    with pytest.raises(surgery.OptionError, match="one scalar"):
        surgery.apply(make("plain"), passes.Mezo(update="sign", blocks=2, directions=3))
    model = surgery.apply(make("plain"), passes.Mezo(dense=True, blocks=1))
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for seed in range(5):
        trained = {c.weight for c in surgery.coordinates(model) if c.active}
        before = weights(model)
        step(model, optimizer, "plain", seed)
        assert {n for n, p in own(model).items() if not torch.equal(p, before[n])} == trained
        live = [c for c in surgery.coordinates(model) if c.active]
        assert {id(p) for p in optimizer.state} <= {id(c.parameter) for c in live}


@pytest.mark.parametrize("blocks", [0, 5])
def test_numbers_of_blocks_that_there_are_not(blocks):
    with pytest.raises(surgery.OptionError, match=rf"mezo: blocks={blocks}.*(least 1|in 4 blocks)"):
        surgery.apply(make("plain"), "mezo", blocks=blocks)


@pytest.mark.parametrize("blocks", [None, 1])
def test_a_slope_that_is_not_finite_changes_nothing_where_the_first_weight_rests(blocks):
    model = surgery.apply(make("plain"), passes.Mezo(blocks=blocks))
    optimizer = sgd(model)
    step(model, optimizer, "plain")  # in blocks, the embedding rests from now on
    if blocks is None:
        next(iter(own(model).values())).requires_grad_(False)
    before = weights(model)
    (loss_of(model, inputs_of("plain")) * math.nan).backward()
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in own(model).items())
    assert surgery.journal(model).shape == (1, 2)
