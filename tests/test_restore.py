"""A restore is complete on any object, not on a fresh one only."""

from __future__ import annotations

import copy

import pytest
import torch
from laws import PASSES, own, state_of
from test_resume import advance, begin

import surgery

pytestmark = pytest.mark.filterwarnings("ignore:.*scalars that")
STEPS = 20
SAVED, ELSEWHERE = 3, (0, 1, 4, 7)  # rounds have 2 or 3 steps


@pytest.mark.parametrize("row", PASSES)
def test_a_load_at_any_step_into_a_run_at_any_other(row, tmp_path):
    run = begin(row, "plain", seed=0)
    advance(*run, "plain", range(SAVED))
    surgery.save(run[0], tmp_path, *run[1:])
    advance(*run, "plain", range(SAVED, SAVED + STEPS))
    expected = {name: p.detach().clone() for name, p in own(run[0]).items()}
    held = states(run)
    others = [(f"from step {n}", begin(row, "plain", seed=5), n) for n in ELSEWHERE]
    for what, other, steps in [("the run itself", run, 0), *others]:
        advance(*other, "plain", range(50, 50 + steps))
        surgery.load(other[0], tmp_path, *other[1:])
        assert state_of(other[0]).clock.step == SAVED
        advance(*other, "plain", range(SAVED, SAVED + STEPS))
        for name, parameter in own(other[0]).items():
            assert torch.equal(parameter, expected[name]), (what, name)
        assert states(other) == held, what  # and nothing is kept of what is not trained any more


def states(run):
    model, optimizer, _ = run
    names = {id(p): name for name, p in model.named_parameters()}
    return sorted(names[id(p)] for p, state in optimizer.state.items() if state)


@pytest.mark.parametrize("row", PASSES)
def test_stateful_goes_back_within_a_process(row):
    model, optimizer, scheduler = begin(row, "plain", seed=0)
    advance(model, optimizer, scheduler, "plain", range(SAVED))
    saved = copy.deepcopy(
        [model.state_dict(), optimizer.state_dict(), scheduler.state_dict()]
        + [surgery.Stateful(model).state_dict()]
    )
    advance(model, optimizer, scheduler, "plain", range(SAVED, SAVED + 8))
    expected = {name: p.detach().clone() for name, p in own(model).items()}
    model.load_state_dict(saved[0])
    surgery.Stateful(model).load_state_dict(saved[3])
    optimizer.load_state_dict(saved[1])
    scheduler.load_state_dict(saved[2])
    advance(model, optimizer, scheduler, "plain", range(SAVED, SAVED + 8))
    for name, parameter in own(model).items():
        assert torch.equal(parameter, expected[name]), name
