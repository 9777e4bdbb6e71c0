"""Bad input: a clear error, before anything changes, with the fix in the message."""

from __future__ import annotations

import copy

import pytest
import torch
from laws import anatomy
from models import LAYERS, inputs_of, loss_of, make
from torch import nn

import passes
import surgery
from surgery.engine.finding import surgery_of

BAD = [
    ("unknown pass", "miza", {}, surgery.OptionError, "Did you mean 'misa'"),
    ("unknown option", "misa", {"bugdet": 0.1}, surgery.OptionError, "Did you mean 'budget'"),
    ("ill-typed", "misa", {"budget": "3%"}, surgery.OptionError, "budget='3%' is a str"),
    ("ill-typed int", "misa", {"period": 2.5}, surgery.OptionError, "period=2.5 is a float"),
    ("a flag is no number", "misa", {"period": True}, surgery.OptionError, "period=True"),
    ("choice", "badam", {"order": "up"}, surgery.OptionError, "order='up'"),
    ("budget 0", "misa", {"budget": 0.0}, surgery.OptionError, r"lies in \(0, 1\]"),
    ("budget 3", "misa", {"budget": 3}, surgery.OptionError, "write 0.03"),
    ("budget tiny", "misa", {"budget": 1e-4}, surgery.OptionError, "smallest module.*Use budget="),
    ("period 0", "lisa", {"period": 0}, surgery.OptionError, "at least 1"),
    ("eta", "misa", {"eta": -1.0}, surgery.OptionError, "eta=-1.0"),
    ("too many layers", "lisa", {"layers": 9}, surgery.OptionError, f"has {LAYERS} blocks"),
    ("no target", "misa", {"targets": ["q_porj"]}, surgery.TargetError, "Did you mean 'q_proj"),
    ("no always", "misa", {"always": ["nrom"]}, surgery.TargetError, "always='nrom'"),
    ("containers", "misa", {"targets": ["self_attn"]}, surgery.TargetError, "own no parameters"),
    ("only vectors", "misa", {"targets": ["norm"]}, surgery.TargetError, "no trainable matrix"),
    ("a class", passes.Misa, {}, surgery.OptionError, r"write Misa\(\)"),
    ("not a pass", 3, {}, surgery.OptionError, "3 is not a pass"),
    ("nothing", [], {}, surgery.OptionError, "no pass given"),
    ("options of many", ["misa", "lisa"], {"budget": 0.1}, surgery.OptionError, "single pass"),
]


@pytest.mark.parametrize("spec, options, kind, text", [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_told_and_changes_nothing(spec, options, kind, text):
    model = make("llama")
    before = anatomy(model)
    with pytest.raises(kind, match=text):
        surgery.apply(model, spec, **options)
    assert anatomy(model) == before
    assert issubclass(kind, surgery.SurgeryError) and issubclass(kind, ValueError)


def test_models_that_cannot_be_operated_on():
    with pytest.raises(surgery.ModelError, match="no parameters"):
        surgery.apply(nn.ReLU(), "misa")
    with torch.device("meta"):
        meta = make("llama")
    with pytest.raises(surgery.ModelError, match=r"meta device.*surgery\.plan"):
        surgery.apply(meta, "misa", budget=0.2)
    with pytest.raises(surgery.ModelError, match=r"takes an nn\.Module"):
        surgery.apply("gpt2", "misa")  # type: ignore[arg-type]
    for verb in (surgery.remove, surgery.coordinates, surgery.report):
        with pytest.raises(surgery.ModelError, match="nothing was applied"):
            verb(make("plain"))


def test_a_model_wrapped_in_ddp_is_refused(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(make("plain"))
        with pytest.raises(surgery.ModelError, match="Apply first, wrap afterwards"):
            surgery.apply(wrapped, "misa", budget=0.2)
    finally:
        torch.distributed.destroy_process_group()


def test_an_optimizer_that_lacks_coordinates_raises_at_its_first_step():
    model = make("gpt2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    surgery.apply(model, "misa", budget=0.3)
    loss_of(model, inputs_of("gpt2")).backward()
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(surgery.OptimizerError, match=r"c_attn.*built before surgery\.apply"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_an_optimizer_built_before_that_holds_everything_is_fine():
    model = make("plain")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    surgery.apply(model, "misa", budget=0.3, period=1)
    for seed in range(3):
        loss_of(model, inputs_of("plain", seed=seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = surgery_of(model)
    assert state is not None and state.clock.step == 3


def test_two_optimizers_may_share_the_coordinates_and_tick_once():
    model = make("plain")
    surgery.apply(model, "misa", budget=1.0)
    halves = [list(model.blocks[0].parameters()), list(model.parameters())]
    first = {id(p) for p in halves[0]}
    halves[1] = [p for p in halves[1] if id(p) not in first]
    optimizers = [torch.optim.AdamW(half, lr=1e-3) for half in halves]
    for _ in range(4):
        loss_of(model, inputs_of("plain")).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    state = surgery_of(model)
    assert state is not None and state.clock.step == 4


def test_an_optimizer_of_another_model_is_left_alone():
    model, other = make("plain"), make("plain", seed=1)
    surgery.apply(model, "misa", budget=0.3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    loss_of(other, inputs_of("plain")).backward()
    optimizer.step()
    state = surgery_of(model)
    assert state is not None and state.clock.step == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", ["misa", "lisa", "badam"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(name, clip, value):
    model = make("plain")
    surgery.apply(model, name, **({"budget": 0.3} if name == "misa" else {}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for bad in (False, True, False):
        loss = loss_of(model, inputs_of("plain"))
        before = {n: p.clone() for n, p in model.named_parameters()}
        state = copy.deepcopy(optimizer.state_dict()["state"])
        rounds = surgery_of(model).decision.methods[0]  # type: ignore[union-attr]
        seen = copy.deepcopy(rounds.scores), rounds.steps
        (loss * value if bad else loss).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        same = all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert same == bad
        if bad:
            after = optimizer.state_dict()["state"]
            assert str(after) == str(state)
            assert rounds.steps == seen[1]
            if rounds.scores is not None:
                assert vars(rounds.scores)["sums"] == vars(seen[0])["sums"]
    assert "1, for NaN or infinite" in str(surgery.report(model))


def test_a_large_but_finite_gradient_in_half_precision_is_no_reason_to_skip():
    model = make("plain").to(torch.float16)
    surgery.apply(model, "misa", budget=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for c in surgery.coordinates(model):
        c.parameter.grad = torch.full_like(c.parameter, 60000.0)
    optimizer.step()
    state = surgery_of(model)
    assert state is not None and state.clock.skipped == 0 and state.clock.step == 1


def test_the_unrelated_distribution_is_named(monkeypatch):
    import importlib.metadata

    monkeypatch.setattr(surgery, "_version", lambda name: "0.1.3")
    with pytest.warns(RuntimeWarning, match="pip uninstall surgery"):
        surgery._warn_of_namesake()
    monkeypatch.setattr(surgery, "_version", importlib.metadata.version)
    surgery._warn_of_namesake()  # it is not installed here: silent


def test_third_parties_can_register_and_names_are_unique():
    from dataclasses import dataclass

    from surgery.contract.registry import _PASSES

    with pytest.raises(surgery.OptionError, match=r"taken by passes\.misa"):

        @surgery.register("misa")
        @dataclass(frozen=True, kw_only=True)
        class Mine:
            pass

    with pytest.raises(surgery.OptionError, match="goes above @dataclass"):

        @surgery.register("mine")
        class NoDataclass:
            pass

    @surgery.register("mine")
    @dataclass(frozen=True, kw_only=True)
    class Top:
        def start(self, model: nn.Module):
            return passes.BAdam(order="descending").start(model)

    try:
        assert "mine" in surgery.available()
        model = surgery.apply(make("plain"), "mine")
        assert {c.weight for c in surgery.coordinates(model) if c.active} == {
            n for n, _ in model.named_parameters() if n.startswith("blocks.2.")
        }
    finally:
        del _PASSES["mine"]


class Counting:
    """An optimizer that is not torch.optim's."""

    def __init__(self, parameters) -> None:
        self.param_groups = [{"params": list(parameters)}]
        self.state: dict = {}

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                self.state[parameter] = {"sum": parameter.grad.clone()}
                parameter -= 0.1 * parameter.grad


def test_step_by_hand_serves_other_optimizers():
    model = make("plain")
    surgery.apply(model, "badam", period=2, order="ascending")
    optimizer = Counting(model.parameters())
    for _ in range(5):
        loss_of(model, inputs_of("plain")).backward()
        surgery.step(model, optimizer)
        model.zero_grad()
    active = {c.parameter for c in surgery.coordinates(model) if c.active}
    assert set(optimizer.state) == active
    with pytest.raises(surgery.OptimizerError, match="no param_groups"):
        surgery.step(model, object())
