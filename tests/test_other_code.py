"""What other code does to a model and its parameters: it has its effect, or is refused by name."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from laws import PASSES, own, state_of, weights
from models import inputs_of, layers, loss_of, make
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.trainer_pt_utils import get_parameter_names

import passes
import surgery

pytestmark = pytest.mark.filterwarnings("ignore:.*scalars that", "ignore:.*weight_decay of")
ALL_AT_ONCE = {
    "misa": lambda: passes.Misa(budget=1.0, period=100),
    "lisa": lambda: passes.Lisa(layers=3, period=100),
    "rso": lambda: passes.Rso(rank=4, period=100),
    "velora": lambda: passes.Velora(groups=4),
    "galore": lambda: passes.Galore(rank=4, projection="random"),
}


def step(model: nn.Module, optimizer: Any, seed: int = 0, family: str = "plain") -> None:
    torch.manual_seed(seed)  # the same dropout
    loss_of(model, inputs_of(family, seed=seed)).backward()
    optimizer.step()
    optimizer.zero_grad()


def sgd(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


# -- optimizers ------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "Adam": (torch.optim.Adam, {}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "Adamax": (torch.optim.Adamax, {}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.5}),
    "Rprop": (torch.optim.Rprop, {}),
    "ASGD": (torch.optim.ASGD, {}),
}
FUSED = ("SGD", "Adam", "AdamW", "Adagrad")
FORMS = [(kind, form) for kind in OPTIMIZERS for form in ("for-loop", "foreach")]
FORMS += [(kind, "fused") for kind in FUSED]


@pytest.fixture(scope="module")
def captured() -> tuple[nn.Module, nn.Module]:
    """A GPT-2 whose fused c_attn is trained in blocks, and a plain one that trains the same."""
    ours = surgery.apply(make("gpt2"), passes.Misa(budget=1.0, period=1000))
    trained = {c.weight for c in surgery.coordinates(ours)}
    plain = make("gpt2")
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in trained)
    return ours, plain


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_every_optimizer_takes_the_plain_models_way(captured, kind, form):
    make_one, options = OPTIMIZERS[kind]
    how = {"fused": {"fused": True}, "foreach": {"foreach": True}}.get(form, {"foreach": False})
    runs = []
    for model in map(copy.deepcopy, captured):
        optimizer = make_one(model.parameters(), lr=1e-3, **options, **how)
        before = weights(model)
        for seed in range(3):
            step(model, optimizer, seed, "gpt2")
        runs.append({name: p.detach() - before[name] for name, p in own(model).items()})
    for name, moved in runs[1].items():
        torch.testing.assert_close(runs[0][name], moved, rtol=2e-3, atol=2e-6, msg=name)


def test_bitsandbytes_moves_every_entry_of_a_block(captured):
    made = pytest.importorskip("bitsandbytes").optim.AdamW8bit
    ours = copy.deepcopy(captured[0])
    before = weights(ours)
    step(ours, made(ours.parameters(), lr=1e-3, min_8bit_size=1), family="gpt2")
    for c in surgery.coordinates(ours):
        moved = own(ours)[c.weight].detach() != before[c.weight]
        assert float(moved.float().mean()) > 0.99, c.weight


class Ahead(torch.optim.Optimizer):
    """Lookahead: an optimizer around an optimizer."""

    def __init__(self, inner: torch.optim.Optimizer, every: int = 2) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.every, self.made = inner, every, 0
        self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.inner.step()
        self.made += 1
        if self.made % self.every == 0:
            fast = [p for g in self.param_groups for p in g["params"]]
            for slow, parameter in zip(self.slow, fast, strict=True):
                if parameter.grad is not None:
                    slow.lerp_(parameter, 0.5)
                    parameter.copy_(slow)


def test_an_optimizer_around_another_makes_one_step(captured):
    runs = []
    for model in map(copy.deepcopy, captured):
        optimizer = Ahead(torch.optim.AdamW(model.parameters(), lr=1e-3))
        for seed in range(4):
            step(model, optimizer, seed, "gpt2")
        runs.append(weights(model))
    for name, value in runs[1].items():
        torch.testing.assert_close(runs[0][name], value, rtol=1e-4, atol=2e-6, msg=name)
    model = surgery.apply(make("plain"), "badam", period=3)
    optimizer = Ahead(sgd(model))
    for seed in range(4):
        step(model, optimizer, seed)
    clock = state_of(model).clock
    assert clock.step == 4 and state_of(model).decision.methods[0].round == 1
    for _ in range(2):  # a step that an error ends is not around the next one
        with pytest.raises(ZeroDivisionError):
            sgd(model).step(lambda: 1 / 0)
    step(model, sgd(model), 4)
    assert clock.step == 5


# -- steps into 16-bit weights ---------------------------------------------------------------------


def displacement(row: Callable[[], Any], dtype: torch.dtype, lr: float) -> torch.Tensor:
    model = make("plain", seed=3).to(torch.bfloat16).to(dtype)
    surgery.apply(model, row())
    before = {name: p.double() for name, p in weights(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    for seed in range(60):
        step(model, optimizer, seed)
    return torch.cat([(p.double() - before[n]).flatten() for n, p in own(model).items()]).detach()


@pytest.mark.parametrize("lr", [1e-5, 1e-4])
@pytest.mark.parametrize("row", ["misa", "lisa", "badam", "rso"])
def test_steps_into_bfloat16_are_not_lost(row, lr):
    make_one = {
        "misa": lambda: passes.Misa(budget=0.6, period=20),
        "lisa": lambda: passes.Lisa(layers=1, period=20),
        "badam": lambda: passes.BAdam(period=20),
        "rso": lambda: passes.Rso(rank=8, period=30),
    }[row]
    wide, narrow = (displacement(make_one, d, lr) for d in (torch.float32, torch.bfloat16))
    along = float(narrow @ wide / (wide @ wide))
    across = float((narrow - along * wide).norm() / wide.norm())
    # Rounding at random is right on average: what it adds across falls with the root of the count.
    assert abs(along - 1.0) < 0.03 + 3 * across / len(wide) ** 0.5


def test_precision_of_weights_is_said_to_lose_them():
    row = partial(passes.BAdam, period=20, precision="weights")
    wide, narrow = (displacement(row, d, 1e-5) for d in (torch.float32, torch.bfloat16))
    assert float(narrow @ wide / (wide @ wide)) < 0.5
    assert "lose" in (passes.Misa.__doc__ or "") or "lost" in (passes.Misa.__doc__ or "")


@pytest.mark.parametrize("row", ["exact", "badam as weights", "badam", "float32"])
@pytest.mark.parametrize("lr", [1e-6, 1e-2])
def test_report_says_what_share_of_a_step_was_lost(row, lr):
    spec = {
        "badam as weights": lambda: passes.BAdam(precision="weights"),
        "badam": lambda: passes.BAdam(),
    }.get(row, lambda: [passes.Recompute(), passes.ChunkedLoss()])
    model = surgery.apply(
        make("plain").to(torch.float if row == "float32" else torch.bfloat16), spec()
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in own(model).items()}
    loss_of(model, inputs_of("plain")).backward()
    given = {name: p.grad != 0 for name, p in own(model).items() if p.grad is not None}
    optimizer.step()
    still = sum(int((own(model)[n][m] == before[n][m]).sum()) for n, m in given.items())
    text = dict(surgery.report(model).lines).get("lost to rounding", "")
    if row in ("badam", "float32"):
        assert not text
        return
    share = still / sum(int(m.sum()) for m in given.values())
    said = re.search(r"in step 1, (\d+)% of the entries", text)
    assert (said is not None) == (share >= 0.01)
    if lr == 1e-6:
        assert share > 0.5 and said is not None
        assert int(said[1]) == pytest.approx(100 * share, abs=1)  # all of these weights are small
        assert "float32 weights under autocast" in text


def test_copies_are_freed_with_the_round():
    model = make("plain").bfloat16()
    surgery.apply(model, "badam", period=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    largest = max(c.parameter.numel() for c in surgery.coordinates(model))
    for seed in range(6):
        step(model, optimizer, seed)
        live = [c.parameter for c in surgery.coordinates(model) if c.active]
        held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in table(model)}
        assert sum(held.values()) <= 4 * (sum(p.numel() for p in live) + largest)
        assert {id(p) for p, state in optimizer.state.items() if state} <= {id(p) for p in live}


def table(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name not in own(model)]


# -- by hand, and inside of steps ------------------------------------------------------------------


@pytest.mark.parametrize(("row", "family"), [("misa", "gpt2"), ("rso", "gpt2"), ("rso", "plain")])
def test_what_is_written_by_hand_is_followed_at_the_next_read(row, family):
    model = surgery.apply(make(family), ALL_AT_ONCE[row]())
    optimizer = sgd(model, 1e-3)
    step(model, optimizer, 0, family)
    c = next(c for c in surgery.coordinates(model) if c.parameter is not own(model)[c.weight])
    weight, before = own(model)[c.weight], own(model)[c.weight].detach().clone()
    change = torch.randn_like(c.parameter) * 1e-2
    with torch.no_grad():
        c.parameter.add_(change)
        model(**inputs_of(family)) if family == "gpt2" else loss_of(model, inputs_of(family))
    torch.testing.assert_close(weight.detach(), before + c.expand(change), rtol=1e-5, atol=1e-6)
    c.parameter.data = (c.parameter.data + change).contiguous()  # another piece of memory
    loss_of(model, inputs_of(family)).backward()
    torch.testing.assert_close(weight.detach(), before + c.expand(2 * change), rtol=1e-5, atol=1e-6)
    now = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(0.5)  # as a load does
    step(model, optimizer, 1, family)
    torch.testing.assert_close(weight.detach(), 0.5 * now, rtol=0.1, atol=1e-2)


@pytest.mark.parametrize("row", ["misa", "lisa", "rso", "velora", "mezo"])
def test_a_step_whose_closure_is_not_finite_changes_nothing(row):
    model = surgery.apply(make("plain"), PASSES[row]())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    factors = iter([1.0, float("nan"), 1.0])

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, inputs_of("plain")) * next(factors)
        loss.backward()
        return loss

    optimizer.step(closure)
    before, clock = weights(model), state_of(model).clock
    assert (clock.step, clock.skipped) == (1, 0)
    optimizer.step(closure)
    assert (clock.step, clock.skipped) == (1, 1)
    assert all(torch.equal(p, before[n]) for n, p in own(model).items())
    optimizer.step(closure=closure)
    assert (clock.step, clock.skipped) == (2, 1)


@pytest.mark.parametrize("row", ["misa", "rso", "velora"])
def test_a_step_with_a_closure_is_the_step_without(row):
    runs = []
    for inside in (False, True):
        model = surgery.apply(make("plain"), PASSES[row]())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for seed in range(5):

            def closure(seed=seed, model=model, optimizer=optimizer):
                optimizer.zero_grad()
                loss = loss_of(model, inputs_of("plain", seed=seed))
                loss.backward()
                return loss

            if inside:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        runs.append(weights(model))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_gradients_set_by_hand_are_scored():
    runs = []
    for by_hand in (False, True):
        model = surgery.apply(make("plain"), passes.Misa(budget=0.3, period=1, eta=4.0))
        optimizer = sgd(model)
        for seed in range(5):
            loss = loss_of(model, inputs_of("plain", seed=seed))
            active = [c.parameter for c in surgery.coordinates(model) if c.active]
            if by_hand:
                found = torch.autograd.grad(loss, active)
                for parameter, gradient in zip(active, found, strict=True):
                    parameter.grad = gradient
            else:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(weights(model))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


# -- hooks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    ["recompute", "chunked_loss", "misa", "badam", "rso", "velora", "galore", "mezo", "lozo"],
)
def test_hooks_on_modules_are_heard_whenever_they_are_put_on(row):
    eager = make("plain")
    model = surgery.apply(copy.deepcopy(eager), PASSES[row]())
    scale = {
        "register_forward_hook": lambda module, args, out: out * 3.0,
        "register_forward_pre_hook": lambda module, args: (args[0] * 0.5,),
    }
    tolerance = 1e-3 if row in ("mezo", "lozo") else 1e-6

    def agree() -> None:
        losses = [float(loss_of(m, inputs_of("plain")).detach()) for m in (eager, model)]
        assert losses[1] == pytest.approx(losses[0], rel=tolerance)

    agree()
    for name, hook in scale.items():
        for _ in range(2):  # put on, taken off, put on again
            handles = [getattr(m.blocks[0].up, name)(hook) for m in (eager, model)]
            agree()
            agree()
            for handle in handles:
                handle.remove()
            agree()
    assert state_of(model).dispatch.captures <= 5


def test_a_hook_on_a_weight_acts_on_what_is_trained_of_it_or_is_refused():
    keep = torch.ones(32, 96)
    keep[:, :40] = 0.0  # columns of c_attn: in q, and in part of k
    model = make("gpt2")
    weight = model.transformer.h[0].attn.c_attn.weight
    weight.register_hook(lambda gradient: gradient * keep)
    surgery.apply(model, passes.Misa(budget=1.0))
    before = weight.detach().clone()
    step(model, sgd(model, 0.1), family="gpt2")
    moved = weight.detach() != before
    assert not moved[:, :40].any() and float(moved[:, 40:].float().mean()) > 0.9
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        model = surgery.apply(make("plain"), passes.Rso(rank=4))
        loss_of(model, inputs_of("plain"))
        weight = model.blocks[0].up.weight
        getattr(weight, register)(lambda gradient: None)
        with pytest.raises(surgery.ModelError, match=r"blocks\.0\.up\.weight has a hook"):
            loss_of(model, inputs_of("plain"))


# -- second derivatives ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row", ["recompute", "compress", "chunked_loss", "rso", "velora", "galore", "mezo"]
)
def test_a_second_derivative_is_refused_by_name(row):
    model = surgery.apply(make("plain"), PASSES[row]())
    loss = loss_of(model, inputs_of("plain"))
    read = [c.parameter for c in surgery.coordinates(model) if c.active]
    with pytest.raises(surgery.SurgeryError, match=rf"{row}.*create_graph=True.*Leave {row} out"):
        torch.autograd.grad(loss, read, create_graph=True, allow_unused=True)


def test_a_second_derivative_under_samplers_is_right(captured):
    found = []
    for model in map(copy.deepcopy, captured):
        torch.manual_seed(0)
        loss = loss_of(model, inputs_of("gpt2"))
        head = model.transformer.h[0].mlp.c_proj.weight
        (first,) = torch.autograd.grad(loss, head, create_graph=True)
        (loss + 10 * first.square().sum()).backward()
        found.append(head.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


# -- freezing, penalties, averages -----------------------------------------------------------------


@pytest.mark.parametrize("row", ALL_AT_ONCE)
def test_freezing_holds_and_unfreezing_trains_again(row):
    model = surgery.apply(make("plain"), ALL_AT_ONCE[row]())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer)
    weight = model.blocks[1].up.weight
    model.blocks[1].requires_grad_(False)
    before = weights(model)
    for seed in range(3):
        step(model, optimizer, seed)
    for name, value in before.items():
        if name.startswith("blocks.1."):
            assert torch.equal(own(model)[name], value), name
    assert not torch.equal(model.blocks[0].up.weight, before["blocks.0.up.weight"])
    for name in {c.weight for c in surgery.coordinates(model)}:
        model.get_parameter(name).requires_grad_(True)
    step(model, optimizer)
    assert not torch.equal(weight, before["blocks.1.up.weight"])


@pytest.mark.parametrize("row", ["misa", "rso"])
@pytest.mark.parametrize("family", ["gpt2", "plain"])
def test_a_penalty_on_weights_reaches_what_is_trained_of_them(row, family):
    model = surgery.apply(make(family), ALL_AT_ONCE[row]())
    loss_of(model, inputs_of(family)).backward()  # draws
    model.zero_grad()
    name = "transformer.h.0.attn.c_attn.weight" if family == "gpt2" else "blocks.0.up.weight"
    name = "transformer.h.0.mlp.c_fc.weight" if (row, family) == ("rso", "gpt2") else name
    weight = own(model)[name]
    goal = torch.randn_like(weight)
    (weight - goal).square().sum().backward()
    dense = 2 * (weight.detach() - goal)
    for c in (c for c in surgery.coordinates(model) if c.weight == name):
        e = torch.randn_like(c.parameter)
        assert c.parameter.grad is not None
        left, right = float((dense * c.expand(e)).sum()), float((c.parameter.grad * e).sum())
        assert left == pytest.approx(right, rel=1e-4, abs=1e-3)
    assert weight.grad is None or c.parameter is weight


def test_a_penalty_on_what_is_not_trained_or_has_no_gradient_is_refused_by_name():
    model = surgery.apply(make("plain"), "badam", order="ascending")
    loss = loss_of(model, inputs_of("plain"))
    with pytest.raises(surgery.SurgeryError, match=r"blocks\.1\.up\.weight, which is not being"):
        (loss + model.blocks[1].up.weight.square().sum()).backward()
    model = surgery.apply(make("plain"), "mezo")
    loss = loss_of(model, inputs_of("plain"))
    with pytest.raises(surgery.SurgeryError, match=r"blocks\.0\.up\.weight .*Leave the penalty"):
        (loss + model.blocks[0].up.weight.square().sum()).backward()


@pytest.mark.parametrize("row", ["misa", "rso", "lisa", "mezo"])
@pytest.mark.parametrize("run", [False, True])
def test_whoever_writes_all_parameters_changes_each_weight_once(row, run):
    model = surgery.apply(make("gpt2"), PASSES[row](period=100))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    if run:
        loss_of(average, inputs_of("gpt2"))
    before = weights(average.module)
    with torch.no_grad():
        for parameter in own(model).values():
            parameter.add_(1.0)
    average.update_parameters(model)
    for name, parameter in own(average.module).items():
        change = parameter.detach() - before[name]
        torch.testing.assert_close(change, torch.full_like(change, 0.1), rtol=1e-3, atol=1e-5)
    loss_of(average, inputs_of("gpt2"))
    with torch.no_grad():
        for parameter in average.module.parameters():
            parameter.mul_(0.5)  # shrink, clip, add noise
    after = weights(average.module)
    loss_of(average, inputs_of("gpt2"))
    for name, parameter in own(average.module).items():
        assert torch.equal(parameter, after[name]), name


# -- names, modules, statistics, modes -------------------------------------------------------------


@pytest.mark.parametrize("row", ["lisa", "rso"])
def test_groups_by_name_treat_what_stands_for_a_weight_as_the_weight(row):
    model = make("gpt2", **layers("gpt2", 2)).bfloat16()
    pattern = [re.compile("bias")]
    decayed = set(get_parameter_names(model, [nn.LayerNorm], pattern))
    surgery.apply(model, passes.Lisa(layers=2) if row == "lisa" else ALL_AT_ONCE[row]())
    now = set(get_parameter_names(model, [nn.LayerNorm], pattern))
    named = dict(model.named_parameters())
    stands = {id(c.parameter): c.weight for c in surgery.coordinates(model)}
    for name, parameter in named.items():
        weight = stands.get(id(parameter))
        if weight is not None and name not in decayed:
            assert weight in name, name
            assert (name in now) == (weight in decayed), name
            assert model.get_parameter(name) is parameter


def test_a_replaced_module_is_refused_by_name():
    model = surgery.apply(make("llama"), passes.Lisa(layers=1))
    step(model, sgd(model), family="llama")
    model.lm_head = nn.Linear(model.lm_head.in_features, 96, bias=False)
    with pytest.raises(
        surgery.ModelError, match=r"lm_head was replaced .*surgery\.remove\(model\)"
    ):
        loss_of(model, inputs_of("llama"))
    model = surgery.apply(make("llama"), "rso", rank=4)
    model.model.layers[0] = copy.deepcopy(model.model.layers[0])
    with pytest.raises(surgery.ModelError, match=r"model\.layers\.0 was replaced|replaced"):
        loss_of(model, inputs_of("llama"))


class Sometimes(nn.Module):
    """Blocks that are skipped at random, all of them at times."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.skip = torch.zeros(3, dtype=torch.bool)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block, skip in zip(self.blocks, self.skip, strict=True):
            x = torch.where(skip, x, block(x)) if not bool(skip) else x
        return x.square().mean()


@pytest.mark.parametrize("row", ["misa", "badam", "rso", "lisa"])
def test_a_forward_that_uses_nothing_trained_makes_no_error_and_no_move(row):
    options = {"lisa": {"layers": 1}, "misa": {"budget": 0.3}, "rso": {"rank": 2}}.get(row, {})
    model = surgery.apply(Sometimes(), row, **options)
    optimizer = sgd(model)
    for skipped in ([0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 1, 1]):
        model.skip = torch.tensor(skipped, dtype=torch.bool)
        before = weights(model)
        model(torch.randn(2, 8)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if all(skipped):
            assert all(torch.equal(p, before[n]) for n, p in own(model).items())
    text = str(surgery.report(model))
    assert re.search(r"optimizer steps\W+4\b", text)
    assert re.search(r"forwards without a gradient\W+[23]\b", text)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@pytest.mark.parametrize("row", ["mezo", "lozo", "misa"])
def test_statistics_move_once_a_batch(row):
    torch.manual_seed(0)
    plain = Normed()
    model = surgery.apply(copy.deepcopy(plain), row, **({"budget": 1.0} if row == "misa" else {}))
    x = torch.randn(6, 16, 8) * 5 + 3
    for batch in x:
        for each in (plain, model):
            each(batch)
        surgery.report(model)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer, rtol=1e-2, atol=1e-2)
    assert int(model.blocks[0][1].num_batches_tracked) == 6


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("row", ["misa", "rso", "recompute", "mezo", "compress"])
@pytest.mark.parametrize("first", [False, True])
def test_modes_around_a_step_see_the_step_that_is_made(row, first):
    runs = []
    flops = partial(FlopCounterMode, display=False)
    for mode in (None, Counting, flops, torch.autograd.detect_anomaly):
        model = surgery.apply(make("plain"), PASSES[row]())
        optimizer = sgd(model)
        if not first:
            step(model, optimizer)
        if mode is None:
            step(model, optimizer, 1)
        else:
            with mode() as entered:
                step(model, optimizer, 1)
            assert getattr(entered, "count", 1) > 0
        if mode is not flops:  # it puts hooks on every module, which breaks graphs
            assert state_of(model).dispatch.captures == 1
            runs.append(weights(model))
    for other in runs[1:]:
        assert all(torch.equal(value, other[name]) for name, value in runs[0].items())


@pytest.mark.parametrize("steps", [0, 1])  # before: the count sees the capture, or not
def test_flops_are_those_of_the_plain_model_that_trains_the_same(steps):
    model = surgery.apply(make("llama", **layers("llama", 2)), passes.Misa(budget=0.2))
    for _ in range(steps):
        step(model, sgd(model), family="llama")
    plain = make("llama", **layers("llama", 2))
    active = {c.weight for c in surgery.coordinates(model) if c.active}
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in active)
    counts = []
    for each in (model, plain):
        with FlopCounterMode(display=False) as counter:
            loss_of(each, inputs_of("llama")).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("pass_", ["mezo", "sparse_mezo", "lozo", "subzero"])
def test_adalora_is_refused_by_passes_without_gradients(pass_):
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=20, tinit=2, tfinal=5, target_modules=["q_proj"]
    )
    model = peft.get_peft_model(make("llama"), config)
    before = {k: p.requires_grad for k, p in model.named_parameters()}
    with pytest.raises(surgery.ModelError, match=rf"{pass_} .*AdaLoRA .*Use LoraConfig"):
        surgery.apply(model, pass_)
    assert before == {k: p.requires_grad for k, p in model.named_parameters()}
