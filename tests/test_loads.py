"""Saves and loads in odd company: optimizers that keep sums, loads that fail, files of others."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from laws import adamw, own, state_of, train
from models import inputs_of, loss_of, make
from test_runs import Counting
from torch.optim import lr_scheduler

import passes
import surgery


def values(model):
    return {name: p.detach().clone() for name, p in own(model).items()}


def test_lbfgs_goes_on_to_the_bit(tmp_path):
    """Its sums over whole histories depend, in the last bits, on where tensors lie in memory."""

    def begin(seed):
        model = surgery.apply(make("plain", seed), "recompute")
        return model, torch.optim.LBFGS(model.parameters(), lr=1e-2, max_iter=2)

    def go(model, optimizer, seeds):
        for seed in seeds:

            def closure(seed=seed):
                optimizer.zero_grad()
                loss = loss_of(model, inputs_of("plain", seed=seed))
                loss.backward()
                return loss

            optimizer.step(closure)

    run = begin(0)
    go(*run, range(3))
    surgery.save(run[0], tmp_path, run[1])
    other = begin(5)
    surgery.load(other[0], tmp_path, other[1])
    for each in (run, other):
        go(*each, range(3, 6))
    for name, value in own(run[0]).items():
        assert torch.equal(own(other[0])[name], value), name


def test_a_load_between_two_optimizers_begins_a_step_anew(tmp_path):
    model = surgery.apply(make("plain"), passes.BAdam(period=2))
    own_ = list(model.parameters())
    both = [torch.optim.SGD(part, lr=0.1) for part in (own_[:4], own_[4:])]

    def step(optimizers):
        loss_of(model, inputs_of("plain")).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    step(both)
    surgery.save(model, tmp_path)
    step(both[:1])
    surgery.load(model, tmp_path)
    step(both[1:])
    assert state_of(model).clock.step == 1
    step(both[:1])
    assert state_of(model).clock.step == 2


class Failing:
    """A schedule of somebody's own."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def state_dict(self):
        return {"count": 1}

    def load_state_dict(self, state) -> None:
        if self.fails:
            raise KeyError("count")


class Broken(Counting):
    def set_extra_state(self, state) -> None:
        raise KeyError("state")


def test_a_load_that_somebodys_own_code_ends_changes_nothing(tmp_path):
    model = surgery.apply(make("plain"), passes.BAdam(period=4))
    optimizer = adamw(model)
    train(model, "plain", 2, optimizer)
    surgery.save(model, tmp_path / "run", optimizer, Failing(False))
    train(model, "plain", 1, optimizer)
    before, moments = values(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(KeyError):
        surgery.load(model, tmp_path / "run", optimizer, Failing(True))
    assert all(torch.equal(own(model)[name], value) for name, value in before.items())
    assert state_of(model).clock.step == 3
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            assert torch.equal(value, moments["state"][index][key])

    surgery.save(surgery.apply(Counting(1), "badam"), tmp_path / "extra")
    broken = Broken(0)
    broken.__class__ = type("Counting", (Broken,), {})
    surgery.apply(broken, "badam")
    before = values(broken)
    with pytest.raises(KeyError):
        surgery.load(broken, tmp_path / "extra")
    assert all(torch.equal(own(broken)[name], value) for name, value in before.items())


def test_other_schedules_inside_of_one_are_refused(tmp_path):
    model = surgery.apply(make("plain"), passes.BAdam(period=2))
    optimizer = adamw(model)

    def made(*inner):
        return lr_scheduler.SequentialLR(optimizer, list(inner), [2])

    warm = lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 2)
    surgery.save(
        model, tmp_path, optimizer, made(warm, lr_scheduler.CosineAnnealingLR(optimizer, 9))
    )
    other = made(warm, lr_scheduler.ExponentialLR(optimizer, 0.5))
    with pytest.raises(surgery.CheckpointError, match="other schedules inside of SequentialLR"):
        surgery.load(model, tmp_path, optimizer, other)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_parts_of_a_copied_model_take_no_second_surgery(copied):
    other = copied(surgery.apply(make("plain"), "badam"))
    with pytest.raises(surgery.ModelError, match="this model is a part of a Tiny"):
        surgery.apply(other.blocks[0], "badam")
    surgery.remove(other)
    surgery.apply(other.blocks[0], "badam")


def test_files_of_others_stay_beside_a_save_and_links_are_followed(tmp_path):
    mine = tmp_path / "run" / "surgery_state_mine.safetensors"
    mine.parent.mkdir()
    mine.write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "größe 模型")  # not there yet
    model = surgery.apply(make("plain"), "badam")
    for folder in (tmp_path / "run", tmp_path / "link"):
        for _ in range(2):
            surgery.save(model, folder)
            train(model, "plain", 1)
        surgery.load(model, folder)
    assert mine.read_text() == "mine" and len(list(mine.parent.iterdir())) == 3
    assert (tmp_path / "link").is_symlink() and len(list((tmp_path / "link").iterdir())) == 2


def test_a_load_under_inference_mode_leaves_a_run_that_trains(tmp_path):
    model = surgery.apply(make("plain"), passes.Rso(rank=4, period=2))
    optimizer = adamw(model)
    train(model, "plain", 3, optimizer)
    surgery.save(model, tmp_path, optimizer)
    with torch.inference_mode():
        surgery.load(model, tmp_path, optimizer)
    train(model, "plain", 3, optimizer)
    assert state_of(model).clock.step == 6


@pytest.mark.parametrize("tied", [True, False], ids=["tied in the save", "tied here"])
def test_other_ties_than_in_the_save_are_refused(tied, tmp_path):
    surgery.save(surgery.apply(make("llama", tie_word_embeddings=tied), "badam"), tmp_path)
    model = surgery.apply(make("llama", seed=3, tie_word_embeddings=not tied), "badam")
    before = {name: value.clone() for name, value in own(model).items()}
    with pytest.raises(surgery.CheckpointError, match=r"lm_head\.weight .*tie_word_embeddings"):
        surgery.load(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in own(model).items())


def test_names_that_hold_the_name_of_the_table_are_saved(tmp_path):
    def made():
        kept = {"surgery_coordinates_of": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, 2)}
        return surgery.apply(torch.nn.Sequential(OrderedDict(kept)), "recompute")

    model, other = made(), made()
    surgery.save(model, tmp_path)
    surgery.load(other, tmp_path)
    assert all(torch.equal(value, own(other)[name]) for name, value in own(model).items())


def test_what_has_no_state_dict_is_refused_by_name(tmp_path):
    model = surgery.apply(make("plain"), "badam")
    optimizer = adamw(model)
    with pytest.raises(surgery.OptionError, match=r"optimizer= takes one .*state of several"):
        surgery.save(model, tmp_path, [optimizer])
    with pytest.raises(surgery.OptionError, match=r"scheduler= takes an object .*float has none"):
        surgery.save(model, tmp_path, optimizer, 0.1)
    assert not list(tmp_path.iterdir())
    surgery.save(model, tmp_path, optimizer)
    with pytest.raises(surgery.OptionError, match=r"optimizer= takes one"):
        surgery.load(model, tmp_path, (optimizer,))


def test_a_save_in_a_hook_of_the_step_says_to_wait(tmp_path):
    model = surgery.apply(make("plain"), "badam")
    optimizer = adamw(model)
    optimizer.register_step_post_hook(lambda *_: surgery.save(model, tmp_path, optimizer))
    loss_of(model, inputs_of("plain")).backward()
    with pytest.raises(surgery.CheckpointError, match=r"step is under way.* has returned"):
        optimizer.step()


def test_the_model_comes_first():
    with pytest.raises(surgery.OptionError, match=r"comes first: surgery\.apply\(model, 'misa'\)"):
        surgery.apply("misa", make("plain"))
