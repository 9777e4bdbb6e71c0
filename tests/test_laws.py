"""The laws of the library: true for every pass. A new pass adds a row to `laws.PASSES`.

The laws themselves are `surgery.testing`'s, which outside passes run too; here they meet every row
and more families, and hypothesis draws what they are run with.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import (
    PASSES,
    SAMPLING,
    ZEROTH,
    adamw,
    anatomy,
    case,
    laws,
    own,
    rows,
    rows_and_families,
    sampling_rows,
    train,
)
from models import inputs_of, loss_of, make

import passes
import surgery
from surgery.testing import laws as of_surgery

# AdamW over the scalars of zeroth-order passes
pytestmark = pytest.mark.filterwarnings("ignore:.*scalars that")


@rows_and_families
def test_1_apply_keeps_the_object_and_its_own_parameters(row, family):
    of_surgery.law_1_the_model_keeps_its_identity(case(row, family))


@rows_and_families
def test_2_first_forward_is_bit_identical(row, family):
    of_surgery.law_2_the_first_forward_is_the_plain_one(case(row, family))


@rows
def test_3_apply_is_all_or_nothing(row):
    of_surgery.law_3_apply_is_all_or_nothing(case(row))


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


@rows_and_families
def test_4_remove_undoes_apply(row, family):
    of_surgery.law_4_remove_undoes_apply(case(row, family))


@rows_and_families
def test_5_weights_are_current_after_every_step(row, family):
    of_surgery.law_5_weights_are_current_after_every_step(case(row, family))


@rows
def test_5_a_checkpoint_at_any_step_is_a_plain_one(row, tmp_path):
    model = surgery.apply(make("llama"), PASSES[row]())
    train(model, "llama", 3)
    model.eval().save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    inputs = inputs_of("llama")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)


@rows
@laws
@given(seed=st.integers(0, 2**31), period=st.integers(1, 4), steps=st.integers(1, 6))
def test_6_what_is_not_trained_is_bit_identical(row, seed, period, steps):
    of_surgery.law_6_what_is_not_trained_stays(case(row), seed=seed, period=period, steps=steps)


@rows
@pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, torch.optim.RAdam])
def test_7_state_exists_for_live_coordinates_only(row, make_optimizer):
    of_surgery.law_7_state_exists_for_live_coordinates_only(case(row), make=make_optimizer)


@rows_and_families
def test_8_one_capture_however_often_it_resamples(row, family):
    of_surgery.law_8_one_capture(case(row, family))


@rows
def test_10_the_global_generators_are_not_touched(row):
    of_surgery.law_10_the_global_generators_are_not_touched(
        case(row, "gpt2")
    )  # draws dropout masks


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


@pytest.mark.parametrize("row", [row for row in PASSES if row != "velora_redrawn"])
@laws
@given(parts=st.sampled_from([2, 4]), norm=st.sampled_from([0.05, 100.0]))
def test_11_accumulation_equals_one_large_batch(row, parts, norm):
    of_surgery.law_11_accumulation_is_one_large_batch(case(row), parts=parts, norm=norm)


@rows
def test_11_grad_scaler_gives_the_same_run(row):
    of_surgery.law_11_loss_scaling_changes_nothing(case(row))


@rows
@pytest.mark.filterwarnings("ignore")  # transformers and accelerate announce their renamings
def test_11_accelerate_gives_the_plain_loop(row):
    from accelerate import Accelerator

    plain, prepared = make("llama"), make("llama")
    for model in (plain, prepared):
        surgery.apply(model, PASSES[row]())
    train(plain, "llama", 5)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(prepared, adamw(prepared))
    for seed in range(5):
        accelerator.backward(loss_of(model, inputs_of("llama", seed=seed)))
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in own(plain).items():
        assert torch.equal(parameter, own(prepared)[name]), name


@rows
def test_13_the_report_is_the_allocators(row):
    of_surgery.law_13_the_report_is_the_allocators(case(row))


@rows_and_families
def test_15_adjoint(row, family):
    if row in ZEROTH and family == "plain":
        family = "bert"  # a relu that crosses zero between the two evaluations has no slope
    of_surgery.law_15_gradients_are_adjoint(case(row, family))


@rows
def test_16_preconditions_are_told_before_anything_changes(row):
    of_surgery.law_16_preconditions_come_first(case(row))


@rows
def test_17_a_plan_is_what_apply_does(row):
    of_surgery.law_17_a_plan_is_what_apply_does(case(row))


@rows
def test_18_whatever_error_changes_nothing(row):
    of_surgery.law_18_whatever_error_changes_nothing(case(row))


def test_a_broken_pass_is_told_which_law_it_breaks():
    """The laws can fail: a pass that does nothing of what it says breaks them by name."""
    from dataclasses import dataclass

    import surgery.testing
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
            surgery.testing.check(Broken(), ranks=False)
    finally:
        del _PASSES["broken"]
    said = str(error.value)
    for law in ("5 weights are current", "6 what is not trained", "7 state exists", "10 draws"):
        assert f"law {law}" in said, said
    for law in ("law 1 ", "law 2 ", "law 4 ", "law 15 "):
        assert law not in said, said


def test_check_runs_every_law_in_one_call():
    import surgery.testing

    surgery.testing.check(passes.BAdam(), ranks=False)
    assert {int(name.split()[0]) for name in surgery.testing.LAWS} >= set(range(1, 12)) | {
        13,
        14,
        15,
    }
    assert set(SAMPLING) <= set(PASSES)
