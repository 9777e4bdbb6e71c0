"""The laws of the library: true for every pass. A new pass adds a row to `laws.PASSES`.

The laws themselves are `surgery.testing`'s, which outside passes run too; here they meet every row
and more families, and hypothesis draws what some are run with. Law 5 for checkpoints is in
test_export.py, law 12 in test_distributed.py and test_fsdp.py.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import (
    EXCEPT,
    LAW_CASES,
    OF_A_RUN,
    PASSES,
    adamw,
    anatomy,
    case,
    each_pass,
    laws,
    own,
    sampling_rows,
    train,
)
from models import inputs_of, loss_of, make

import passes
import surgery
import surgery.testing
from surgery.testing import LAWS
from surgery.testing import laws as of_surgery

# AdamW over the scalars of zeroth-order passes
pytestmark = pytest.mark.filterwarnings("ignore:.*scalars that")


@pytest.mark.parametrize(("row", "family", "law"), LAW_CASES)
def test_law(row, family, law):
    LAWS[law](case(row, family))


@sampling_rows
def test_3_bad_company(row):
    model = make("plain")
    before = anatomy(model)
    for other in (passes.BAdam(targets=["up"]), passes.Misa(targets=["nowhere"])):
        with pytest.raises(surgery.SurgeryError):
            surgery.apply(model, [PASSES[row](), other])
        assert anatomy(model) == before


def test_3_two_passes_on_one_weight_are_both_named():
    model = make("plain")
    with pytest.raises(surgery.ConflictError, match=r"misa and badam both train blocks\.0\.up"):
        surgery.apply(model, [passes.Misa(budget=0.5), passes.BAdam(targets=["up"])])


@settings(laws, max_examples=12)
@given(
    row=st.sampled_from(sorted(PASSES)),
    seed=st.integers(0, 2**31),
    period=st.integers(1, 4),
    steps=st.integers(1, 6),
)
def test_6_what_is_not_trained_is_bit_identical(row, seed, period, steps):
    of_surgery.law_6_what_is_not_trained_stays(case(row), seed=seed, period=period, steps=steps)


@pytest.mark.parametrize(
    ("row", "make_optimizer"),
    [(row, torch.optim.AdamW) for row in ("misa", "rso", "lozo")]
    + [(row, torch.optim.RAdam) for row in ("badam", "misa_of_rso", "velora_redrawn")],
)
def test_7_no_growth_over_a_hundred_rounds(row, make_optimizer):
    of_surgery.law_7_state_exists_for_live_coordinates_only(case(row), make_optimizer, rounds=100)


@sampling_rows
@laws
@given(seed=st.integers(0, 2**31), noise=st.integers(0, 2**31))
def test_10_draws_depend_on_seed_name_and_period_only(row, seed, noise):
    def schedule(disturbed: bool) -> list[frozenset[str]]:
        model = make("plain")
        method = PASSES[row](seed=seed, period=1).start(model)
        sets = []
        for round in range(8):
            if disturbed:
                random.random(), np.random.rand(), torch.rand(3)
            sets.append(frozenset(method.draw(round + 1)))
        return sets

    torch.manual_seed(noise)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    expected = schedule(False)
    model = make("plain")
    torch.set_rng_state(before[0])
    surgery.apply(model, PASSES[row](seed=seed))
    surgery.report(model)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    assert schedule(True) == expected


@settings(laws, max_examples=8)
@given(
    row=st.sampled_from(sorted(set(PASSES) - {row for row, _ in EXCEPT})),
    parts=st.sampled_from([2, 4]),
    norm=st.sampled_from([0.05, 100.0]),
)
def test_11_accumulation_equals_one_large_batch(row, parts, norm):
    of_surgery.law_11_accumulation_is_one_large_batch(case(row), parts=parts, norm=norm)


@each_pass
@pytest.mark.filterwarnings("ignore")  # transformers and accelerate announce their renamings
def test_11_accelerate_gives_the_plain_loop(row):
    from accelerate import Accelerator

    plain, prepared = make("plain"), make("plain")
    for model in (plain, prepared):
        surgery.apply(model, PASSES[row]())
    train(plain, "plain", 5)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(prepared, adamw(prepared))
    for seed in range(5):
        accelerator.backward(loss_of(model, inputs_of("plain", seed=seed)))
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in own(plain).items():
        assert torch.equal(parameter, own(prepared)[name]), name


def test_a_broken_pass_is_told_which_law_it_breaks():
    """The laws can fail: a pass that does nothing of what it says breaks them by name."""
    from dataclasses import dataclass

    from surgery.contract.registry import _PASSES
    from surgery.passkit import Rounds, coordinate_of, noise, whole_blocks

    @surgery.register("broken")
    @dataclass(frozen=True, kw_only=True)
    class Broken:
        """Draws from torch's generator, moves a weight by hand, and never frees anything."""

        period: int = 2
        seed: int = 0

        def start(self, model):
            units, _ = whole_blocks(model, None, "broken")
            return Moving(
                name="broken",
                units=units,
                period=self.period,
                draw=lambda round: [list(units)[int(torch.randint(len(units), ()))]],
                total=sum(p.numel() for p in model.parameters()),
            )

    class Moving(Rounds):
        def after_step(self, run):
            self.steps += 1
            with torch.no_grad():
                run.model.embed.weight.add_(1.0)
            if self.steps == self.period:
                self.steps = 0
                self._activate(self.draw(0))

    assert coordinate_of and noise
    try:
        with pytest.raises(surgery.testing.LawError) as error:
            surgery.testing.check(Broken(), laws=OF_A_RUN, ranks=False)
    finally:
        del _PASSES["broken"]
    said = str(error.value)
    for law in ("5 weights are current", "6 what is not trained", "7 state exists", "10 draws"):
        assert f"law {law}" in said, said
    for law in ("law 1 ", "law 2 ", "law 4 ", "law 15 "):
        assert law not in said, said


def test_check_runs_every_law_in_one_call():
    def fails():
        raise ZeroDivisionError("a model that cannot be made")

    with pytest.raises(surgery.testing.LawError) as error:
        surgery.testing.check(passes.BAdam(), model=fails, ranks=False)
    for law in LAWS:
        assert f"law {law}: ZeroDivisionError: a model" in str(error.value)
    surgery.testing.check(passes.BAdam(), laws=[*LAWS][:3], ranks=False)
    assert {int(name.split()[0]) for name in LAWS} == set(range(1, 19)) - {12}
