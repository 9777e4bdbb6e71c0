"""What other code writes by hand, lends or puts around: beside a plain model that it does the same
to, or refused by name."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from laws import own, state_of, weights
from models import inputs_of, loss_of, make
from test_other_code import Ahead
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import passes
import surgery

pytestmark = pytest.mark.filterwarnings("ignore:.*scalars that", "ignore:.*weight_decay of")


@pytest.fixture(scope="module")
def captured() -> dict[str, tuple[nn.Module, nn.Module]]:
    """Models of which weights, or copies of parts of them, are trained, and plain ones beside."""
    found = {}
    for family, spec in (("gpt2", passes.Misa(budget=1.0)), ("plain", passes.Recompute())):
        ours, plain = surgery.apply(make(family), spec), make(family)
        trained = {c.weight for c in surgery.coordinates(ours)} or own(plain)
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(name in trained)
        loss_of(ours, inputs_of(family))
        found[family] = ours, plain
    return found


def loss(model: nn.Module, family: str, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)  # the same dropout
    return loss_of(model, inputs_of(family, seed=seed))


def sgd(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def by_name(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in own(model).values() if p.requires_grad]


@torch.no_grad()
def shrink(parameters: Any) -> None:
    for parameter in parameters:
        parameter.mul_(0.9)


# What is done to a model around the step of each batch.


def between(whom: Any, model: nn.Module, family: str, seed: int, optimizer: Any) -> None:
    loss(model, family, seed).backward()
    shrink(whom(model))
    optimizer.step()


def in_a_hook_of_the_optimizer(whom: Any, model, family, seed, optimizer) -> None:
    handle = optimizer.register_step_post_hook(lambda *_: shrink(whom(model)))
    loss(model, family, seed).backward()
    optimizer.step()
    handle.remove()


def gradients_by_name(model: nn.Module, family: str, seed: int, optimizer: Any) -> None:
    loss(model, family, seed)
    for parameter in by_name(model):
        parameter.grad = torch.full_like(parameter, 0.1)
    optimizer.step()


def gradients_of_all(model: nn.Module, family: str, seed: int, optimizer: Any) -> None:
    loss(model, family, seed)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1) if parameter.requires_grad else None
    optimizer.step()


def checkpoint_and_penalty(model: nn.Module, family: str, seed: int, optimizer: Any) -> None:
    found = checkpoint(loss, model, family, seed, use_reentrant=False)
    (found + 0.1 * sum(p.square().sum() for p in by_name(model))).backward()
    optimizer.step()


def hooks_on_all(model: nn.Module, family: str, seed: int, optimizer: Any) -> None:
    every = [p for p in model.parameters() if p.requires_grad]
    handles = [p.register_hook(lambda g: g * 0.5) for p in every]
    loss(model, family, seed).backward()
    for handle in handles:
        handle.remove()
    optimizer.step()


def global_hook(model: nn.Module, family: str, seed: int, optimizer: Any) -> None:
    kind = nn.LayerNorm
    handle = torch_module.register_module_forward_hook(
        lambda module, args, out: out * 0.5 if isinstance(module, kind) else None
    )
    try:
        loss(model, family, seed).backward()
    finally:
        handle.remove()
    optimizer.step()


DONE = {
    "weights between backward and step": partial(between, by_name),
    "all between backward and step": partial(between, lambda model: model.parameters()),
    "weights in a hook": partial(in_a_hook_of_the_optimizer, by_name),
    "all in a hook": partial(in_a_hook_of_the_optimizer, lambda model: model.parameters()),
    "gradients of weights": gradients_by_name,
    "gradients of all": gradients_of_all,
    "a penalty beside a checkpoint around the model": checkpoint_and_penalty,
    "hooks on all": hooks_on_all,
    "a global hook": global_hook,
}


@pytest.mark.parametrize("family", ["gpt2", "plain"])
@pytest.mark.parametrize("done", DONE)
def test_it_is_what_it_is_on_a_plain_model(captured, family, done):
    runs = []
    for model in map(copy.deepcopy, captured[family]):
        optimizer = sgd(model)
        for seed in range(3):
            DONE[done](model, family, seed, optimizer)
            optimizer.zero_grad()
        runs.append(weights(model))
    for name, value in runs[1].items():
        torch.testing.assert_close(runs[0][name], value, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("whom", ["weights", "all"])
def test_weights_written_before_a_step_under_mapped_coordinates(whom):
    model = surgery.apply(make("plain"), passes.Rso(rank=4))
    optimizer = sgd(model, 0.1)
    loss(model, "plain", 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss(model, "plain", 1).backward()
    before = weights(model)
    shrink(by_name(model) if whom == "weights" else model.parameters())
    expected = {
        c.weight: 0.9 * before[c.weight] + c.expand(-0.1 * c.parameter.grad)
        for c in surgery.coordinates(model)
        if c.parameter is not own(model)[c.weight]
    }
    optimizer.step()
    for name, value in expected.items():
        torch.testing.assert_close(own(model)[name].detach(), value, rtol=1e-5, atol=1e-6)


def test_weights_written_in_bfloat16_before_a_step_or_in_a_hook_keep_what_was_written():
    for done in ("weights between backward and step", "weights in a hook"):
        model = surgery.apply(make("plain").bfloat16(), passes.Lisa(layers=3))
        optimizer, before = sgd(model, 0.0), weights(model)
        for seed in range(3):
            DONE[done](model, "plain", seed, optimizer)
            optimizer.zero_grad()
        name = "blocks.0.up.weight"
        torch.testing.assert_close(
            own(model)[name].detach(), before[name] * 0.9**3, rtol=0.02, atol=0.0
        )


def test_a_gradient_set_on_what_is_not_trained_moves_nothing():
    model = surgery.apply(make("plain"), "badam", order="ascending")
    before, optimizer = weights(model), sgd(model)
    gradients_by_name(model, "plain", 0, optimizer)
    trained = {c.weight for c in surgery.coordinates(model) if c.active}
    moved = {n for n, p in own(model).items() if not torch.equal(p, before[n])}
    assert moved == trained


def test_a_state_dict_has_what_was_written_by_hand(captured):
    model = copy.deepcopy(captured["gpt2"][0])
    loss(model, "gpt2", 0)
    c = next(c for c in surgery.coordinates(model) if c.parameter is not own(model)[c.weight])
    before, change = weights(model)[c.weight], torch.randn_like(c.parameter)
    with torch.no_grad():
        c.parameter.add_(change)
    saved = model.state_dict()[c.weight]
    torch.testing.assert_close(saved, before + c.expand(change))


def test_a_coordinate_that_is_frozen_itself_stays():
    model = surgery.apply(make("plain").bfloat16(), passes.Lisa(layers=3))
    optimizer, weight = sgd(model, 0.1), model.blocks[1].up.weight
    (c,) = (c for c in surgery.coordinates(model) if model.get_parameter(c.weight) is weight)
    before = weight.detach().clone()
    for flag in (False, True):
        c.parameter.requires_grad_(flag)
        loss(model, "plain", 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(weight, before) != flag


def test_a_class_that_gets_another_forward_runs_that(captured, monkeypatch):
    model, plain = map(copy.deepcopy, captured["plain"])
    kind, inputs = type(plain.blocks[0]), inputs_of("plain")
    losses = [loss_of(model, inputs)]
    old = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 0.5 * old(self, x))
    assert torch.equal(loss_of(model, inputs), loss_of(plain, inputs))
    monkeypatch.undo()
    losses.append(loss_of(model, inputs))
    assert torch.equal(*losses) and state_of(model).dispatch.captures == 2


# -- torch.func ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [passes.Misa(budget=1.0), passes.Recompute(), passes.Rso(rank=4), passes.Mezo()],
    ids=lambda spec: spec.name,
)
def test_what_torch_func_makes_of_a_model_is_what_it_makes_of_a_plain_one(spec):
    ours, plain = surgery.apply(make("plain"), spec), make("plain")
    tokens, found = inputs_of("plain")["tokens"], []
    for model in (ours, plain):
        given = {name: p.detach() * 0.5 for name, p in own(model).items()}

        def of(given: Any, model: nn.Module = model) -> torch.Tensor:
            return torch.func.functional_call(model, given, (tokens, tokens))

        leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
        of(leaves).backward()
        gradients = torch.func.grad(of)(given)
        _, tangent = torch.func.jvp(of, (given,), (gradients,))
        stacked = {name: torch.stack([t, 2 * t]) for name, t in given.items()}
        losses = torch.func.vmap(of)(stacked).detach()
        found.append([tangent.detach(), losses, *gradients.values()])
        found[-1] += [t.grad for t in leaves.values() if t.grad is not None]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    loss_of(ours, inputs_of("plain")).backward()  # and it is trained as ever
    sgd(ours).step()
    assert state_of(ours).clock.step == 1


def test_tensors_in_the_place_of_coordinates_are_refused_by_name(captured):
    model, inputs = captured["gpt2"][0], inputs_of("gpt2")
    given = {name: p.detach() for name, p in model.named_parameters()}
    with pytest.raises(surgery.ModelError, match=r"c_attn\.weight.* by their own names"):
        torch.func.functional_call(model, given, (), inputs)
    same = torch.func.functional_call(model, dict(model.named_parameters()), (), inputs)
    assert same.loss.requires_grad


def test_inputs_that_require_a_gradient_are_refused_where_none_comes():
    model = surgery.apply(make("llama"), "mezo")
    inputs = inputs_of("llama")
    embedded = model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(surgery.ModelError, match=r"mezo: inputs_embeds requires a gradient"):
        model(inputs_embeds=embedded, **inputs)
    model(inputs_embeds=embedded.detach(), **inputs).loss.backward()


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["prune", "weight_norm", "spectral_norm"])
def test_a_weight_that_is_computed_since_is_refused_by_name(captured, how):
    model = copy.deepcopy(captured["gpt2"][0])
    module = model.transformer.h[0].mlp.c_fc
    {
        "prune": lambda: prune.l1_unstructured(module, "weight", 0.5),
        "weight_norm": lambda: parametrizations.weight_norm(module),
        "spectral_norm": lambda: parametrizations.spectral_norm(module),
    }[how]()
    with pytest.raises(surgery.ModelError, match=r"c_fc\.weight is computed .*surgery\.remove"):
        loss_of(model, inputs_of("gpt2"))


class Constrained(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embed = nn.Embedding(32, 16, max_norm=0.5 if how == "max_norm" else None)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            if self.how == "data":
                block.weight.data = torch.renorm(block.weight.data, 2, 0, 0.3)
            elif self.how == "in place":
                with torch.no_grad():
                    block.weight.clamp_(-0.1, 0.1)
            x = x + torch.tanh(block(x))
        return x.square().mean()


@pytest.mark.parametrize("how", ["max_norm", "data", "in place"])
def test_a_weight_that_the_forward_writes_is_written_or_refused_by_name(how):
    torch.manual_seed(0)
    plain = Constrained(how)
    ours = surgery.apply(copy.deepcopy(plain), passes.Lisa(layers=3))
    tokens = inputs_of("plain")["tokens"]
    for model in (plain, ours):
        optimizer = sgd(model, 0.1)
        for _ in range(3):
            model(tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, value in own(plain).items():
        assert torch.equal(own(ours)[name], value), name
    narrow = surgery.apply(Constrained(how).bfloat16(), passes.Lisa(layers=3))
    with pytest.raises(surgery.ModelError, match=r"weight is changed in each forward"):
        narrow(tokens)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "spec", [passes.BAdam(period=4), passes.Rso(rank=4, period=4)], ids=lambda spec: spec.name
)
def test_slow_weights_of_an_earlier_round_never_reach_the_weights(spec):
    model = surgery.apply(make("plain").bfloat16(), spec)
    optimizer = Ahead(sgd(model))
    for seed in range(5):
        loss(model, "plain", seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = weights(model)
    loss(model, "plain", 5).backward()
    with pytest.raises(surgery.OptimizerError, match="Ahead writes values of its own"):
        optimizer.step()
    optimizer.zero_grad()
    loss(model, "plain", 6)
    stands = {c.weight for c in surgery.coordinates(model)}
    assert all(torch.equal(own(model)[name], before[name]) for name in stands)


@pytest.mark.parametrize("through_data", [False, True])
def test_steps_by_hand_are_told_that_rounds_do_not_go_on(through_data):
    def train(steps: int) -> None:
        model = surgery.apply(make("plain"), "misa", budget=0.2, period=2)
        for seed in range(steps):
            loss(model, "plain", seed).backward()
            for p in [p for p in model.parameters() if p.grad is not None]:
                if through_data:
                    p.data -= 1e-2 * p.grad
                else:
                    with torch.no_grad():
                        p -= 1e-2 * p.grad
            model.zero_grad()

    train(3)
    with pytest.warns(UserWarning, match=r"rounds never end.*surgery\.step"):
        train(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = surgery.apply(make("plain"), "misa", budget=0.2)
        for seed in range(8):  # gradients that are only looked at
            loss(model, "plain", seed).backward()
            model.zero_grad()
