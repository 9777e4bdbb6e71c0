"""requires_grad switched off and on after `apply`: heard by every pass, or refused by name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from laws import own, state_of, weights
from models import inputs_of, loss_of, make

import passes
import surgery

pytestmark = pytest.mark.filterwarnings("ignore:.*scalars that", "ignore:.*has momentum")


def step(model, optimizer, seed=0):
    loss_of(model, inputs_of("plain", seed=seed)).backward()
    optimizer.step()
    optimizer.zero_grad()


def sgd(model, lr=1e-2):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


SPECS = {
    "misa": lambda: passes.Misa(budget=0.2),
    "rso": lambda: passes.Rso(rank=4),
    "velora": lambda: passes.Velora(groups=4),
    "galore": lambda: passes.Galore(rank=4),
    "mezo": lambda: passes.Mezo(targets=["up", "down"]),
    "misa and recompute": lambda: [passes.Misa(budget=0.2), passes.Recompute()],
}


@pytest.mark.parametrize("row", SPECS)
@pytest.mark.parametrize("before", [False, True])
def test_switching_on_what_no_pass_trains_is_refused_by_name(row, before):
    model = make("plain")
    model.blocks[1].norm.requires_grad_(before)
    surgery.apply(model, SPECS[row]())
    optimizer = sgd(model)
    step(model, optimizer)
    model.blocks[1].norm.weight.requires_grad_(True)
    found = r"requires_grad of blocks\.1\.norm\.weight was switched on after surgery\.apply.*"
    with pytest.raises(surgery.ModelError, match=rf"{found}{row}.*does not train it.*targets="):
        step(model, optimizer)
    model.blocks[1].norm.weight.requires_grad_(False)
    step(model, optimizer)
    assert state_of(model).clock.step == 2


def test_under_exact_passes_alone_the_optimizer_trains_it():
    runs = []
    for row in (None, [passes.Recompute(), passes.ChunkedLoss()]):
        model = make("plain").double()
        model.blocks[1].requires_grad_(False)
        if row:
            surgery.apply(model, row)
        optimizer = sgd(model)
        step(model, optimizer)
        model.blocks[1].norm.requires_grad_(True)
        step(model, optimizer)
        runs.append(weights(model))
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-6, atol=1e-8, msg=name)
    assert not torch.equal(runs[1]["blocks.1.norm.weight"], torch.ones(16, dtype=torch.double))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_round_whose_weights_are_all_frozen_moves_nothing(precision):
    model = surgery.apply(make("plain").to(precision), "badam", period=2, order="ascending")
    optimizer = sgd(model)
    step(model, optimizer)
    model.blocks[0].requires_grad_(False)
    before = weights(model)
    step(model, optimizer)  # torch: element 0 of tensors does not require grad
    assert all(torch.equal(p, before[n]) for n, p in own(model).items())
    assert "or is frozen" in str(surgery.report(model))
    step(model, optimizer)  # of the next block
    assert not torch.equal(model.blocks[1].up.weight, before["blocks.1.up.weight"])


@pytest.mark.parametrize("row", [passes.Mezo, passes.Lozo, passes.SubZero])
def test_a_slope_is_of_what_is_moved(row):
    """Perturbed and not moved, a frozen weight would only add noise to the slope of the others."""
    options = {} if row is passes.Mezo else {"rank": 2}
    model = surgery.apply(make("plain").double(), row(eps=1e-6, **options))
    model.blocks[0].requires_grad_(False)
    model.embed.weight.requires_grad_(False)
    plain = make("plain").double()
    loss_of(model, inputs_of("plain")).backward()
    dense = torch.autograd.grad(loss_of(plain, inputs_of("plain")), [*plain.parameters()])
    dense = {name: g for (name, _), g in zip(plain.named_parameters(), dense, strict=True)}
    active = [c for c in surgery.coordinates(model) if c.active]
    assert 0 < len(active) < len(surgery.coordinates(model))
    one = torch.ones_like(active[0].parameter)
    expected = sum(float((dense[c.weight] * c.expand(one)).sum()) for c in active)
    assert float(active[0].parameter.grad.sum()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("row", ["misa", "rso"])
def test_a_copy_with_frozen_weights_is_trained_and_hears_its_first_step(row, copied):
    model = surgery.apply(make("plain").bfloat16(), SPECS[row]())
    step(model, sgd(model))
    model.blocks[0].up.weight.requires_grad_(False)
    other = copied(model)
    optimizer = sgd(other)

    def closure():
        loss = loss_of(other, inputs_of("plain"))
        loss.backward()
        return loss

    before = weights(other)
    optimizer.step(closure)  # the first thing that it does
    assert state_of(other).clock.step == 2
    assert torch.equal(other.blocks[0].up.weight, before["blocks.0.up.weight"])
    other.blocks[0].up.weight.requires_grad_(True)
    for seed in range(3):
        step(other, optimizer, seed)
    if row == "rso":
        assert not torch.equal(other.blocks[0].up.weight, before["blocks.0.up.weight"])


def test_a_save_loads_where_weights_are_frozen(tmp_path):
    """Made while they were not, and on: their optimizer state is there when they are trained."""
    spec = passes.Lisa(layers=3, period=100)
    model = surgery.apply(make("plain").bfloat16(), spec)
    optimizer = sgd(model)
    step(model, optimizer)
    surgery.save(model, tmp_path, optimizer)
    again = surgery.apply(make("plain", seed=4).bfloat16(), spec)
    again.blocks[0].requires_grad_(False)
    other = sgd(again)
    surgery.load(again, tmp_path, other)
    step(again, other)
    name = next(c.weight for c in surgery.coordinates(again) if c.weight == "blocks.0.up.weight")
    assert torch.equal(again.get_parameter(name), model.get_parameter(name))
    held = {c.weight: c.parameter for c in surgery.coordinates(again)}[name]
    assert "momentum_buffer" in other.state[held]


def test_going_back_without_the_optimizer_frees_the_state_of_what_is_not_trained(tmp_path):
    model = surgery.apply(make("plain"), "badam", period=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer)
    surgery.save(model, tmp_path, optimizer)
    first = {c.weight for c in surgery.coordinates(model) if c.active}
    for seed in range(2):
        step(model, optimizer, seed)
    assert first != {c.weight for c in surgery.coordinates(model) if c.active}
    surgery.load(model, tmp_path, optimizer=False)
    for back in (False, True):
        if back:
            surgery.load(model, tmp_path, optimizer)
        active = {c.weight: c.parameter for c in surgery.coordinates(model) if c.active}
        assert set(active) == first
        held = {id(p) for p, state in optimizer.state.items() if state}
        assert held <= {id(p) for p in active.values()}


def test_what_peft_switches_on_behind_disable_adapter_is_no_one_unfreezing():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["up"], r=2)
    model = peft.get_peft_model(make("plain"), config)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    surgery.apply(model, "misa", budget=0.5, targets=r".*base_layer.*")
    optimizer = sgd(model)
    step(model, optimizer)
    with torch.no_grad(), model.disable_adapter():
        loss_of(model, inputs_of("plain"))
    step(model, optimizer)
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    assert adapters and not any(p.requires_grad or p.grad is not None for p in adapters)
    adapters[0].requires_grad_(True)  # a user's own doing
    with pytest.raises(surgery.ModelError, match=r"was switched on after surgery\.apply"):
        step(model, optimizer)
