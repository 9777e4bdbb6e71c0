"""Zeroth order, hybrid (arXiv 2402.11592): some weights by forwards alone, others by backward."""

from __future__ import annotations

import copy

import pytest
import torch
from laws import method_of, own, weights
from models import build, inputs_of, loss_of, make
from torch import nn
from zeroth import (
    EPS,
    RATE,
    ZEROTH,
    assert_same_weights,
    loss_at,
    moved,
    scalars,
    sgd,
    slope_of,
    step,
    z_of,
)

import passes
import surgery
from surgery.memory import measure
from surgery.zeroth_order.method import TwoPoint

UPPER_HALF = r"model\.layers\.[23]\..*"
UPPER = r"blocks\.[12]\..*|final.*|norm.*"


def llama() -> nn.Module:
    return build("llama", num_hidden_layers=4, hidden_size=64, intermediate_size=256)


def upper_of(model: nn.Module) -> set[str]:
    return {c.weight for c in surgery.coordinates(model) if c.parameter.numel() > 1}


def plain_gradients(plain: nn.Module, inputs, names: set[str]) -> dict[str, torch.Tensor]:
    twin = copy.deepcopy(plain)
    loss_of(twin, inputs).backward()
    return {n: p.grad for n, p in twin.named_parameters() if n in names and p.grad is not None}


@pytest.mark.parametrize("estimate", ["central", "one_sided", "forward"])
@pytest.mark.parametrize("kind", ["mezo", "sparse", "lozo", "subzero"])
@pytest.mark.parametrize("by", ["backward", "misa"])
def test_each_part_moves_as_the_paper_says(kind, estimate, by):
    model, plain = make("plain").double(), make("plain").double()
    upper = [n for n in own(plain) if n.startswith("blocks.1")]
    lower = [n for n in own(plain) if n not in upper]
    if by == "backward":
        surgery.apply(model, ZEROTH[kind](eps=EPS, estimate=estimate, backward=upper))
    else:
        forwards = ZEROTH[kind](eps=EPS, estimate=estimate, targets=lower)
        every = passes.BAdam(period=100, targets=[*upper])
        surgery.apply(model, [forwards, every])
    assert upper_of(model) == {*upper}
    optimizer = sgd(model, lr=RATE)
    for seed in range(4):
        inputs = inputs_of("plain", seed=seed)
        loss = loss_of(model, inputs)
        loss.backward()
        z = {n: v for n, v in z_of(model).items() if n in lower}
        expected = plain_gradients(plain, inputs, {*upper})
        for name, gradient in expected.items():
            torch.testing.assert_close(own(model)[name].grad, gradient, rtol=1e-9, atol=1e-11)
        at = loss_at(plain, 0.0, z, inputs)
        assert loss.item() == pytest.approx(at, rel=1e-12)
        g = slope_of(plain, z, inputs)
        if estimate == "one_sided":
            g = (loss_at(plain, EPS, z, inputs) - at) / EPS
        if estimate == "forward":
            every_grad = plain_gradients(plain, inputs, {*lower})
            g = sum(float((every_grad[n] * z[n]).sum()) for n in z)
        assert scalars(model).grad.item() == pytest.approx(g, rel=1e-6, abs=1e-9)
        moved(plain, {n: -RATE * g * value for n, value in z.items()})
        moved(plain, {n: -RATE * gradient for n, gradient in expected.items()})
        optimizer.step()
        optimizer.zero_grad()
        assert_same_weights(model, plain)


@pytest.mark.filterwarnings("ignore")  # transformers announces its renamings
@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_kept_below_the_cut(checkpointing):
    ids = torch.randint(0, 64, (4, 64))
    hybrid, frozen = llama(), llama()
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("layers.2" in name or "layers.3" in name)
    for each in (hybrid, frozen):
        if checkpointing:
            each.gradient_checkpointing_enable()
    surgery.apply(hybrid, passes.Mezo(backward=UPPER_HALF))
    live = []
    for each in (hybrid, frozen):
        each(input_ids=ids, labels=ids).loss.backward()
        grads = {n: p.grad.clone() for n, p in own(each).items() if p.grad is not None}
        each.zero_grad()
        for name, gradient in grads.items():
            expected = dict(own(frozen))[name].grad
            assert expected is None or torch.equal(gradient, expected)
        live.append(measure(lambda m=each: m(input_ids=ids, labels=ids), torch.device("cpu")).live)
    assert live[0] <= live[1] + 1024, live


def test_a_loss_outside_and_accumulated_parts_give_the_same_gradients():
    ids = inputs_of("llama")["input_ids"]
    found = []
    for inside in (True, False):
        model = llama().double().eval()
        surgery.apply(model, passes.Mezo(eps=EPS, backward=UPPER_HALF))
        for _ in range(2):
            if inside:
                (model(input_ids=ids, labels=ids).loss / 2).backward()
                continue
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss *= 0.5  # written in place, as loops do
            loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 19
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=2e-3)


class Batched(nn.Module):
    """Batch statistics and dropout below and above the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.lower = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.upper = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.upper(self.lower(x))


def test_statistics_move_once_and_masks_are_those_of_a_plain_forward():
    torch.manual_seed(0)
    model = Batched().train()
    plain, x = copy.deepcopy(model), torch.randn(6, 8)
    surgery.apply(model, passes.Mezo(backward=["upper.0", "upper.1"]))
    outputs = []
    for each in (model, plain):
        torch.manual_seed(3)
        outputs.append(each(x))
        outputs[-1].square().sum().backward()
        outputs.append(torch.rand(2))
    torch.testing.assert_close(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer)
    for name, parameter in plain.named_parameters():
        if name.startswith("upper"):
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_adapters_above_and_weights_below():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=r"model\.layers\.1\..*proj")
    model = peft.get_peft_model(llama(), config)
    lower = r".*layers\.0\..*"
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "layers.0." in name)
    surgery.apply(model, passes.Mezo(targets=lower, backward=".*lora_.*"))
    before, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, inputs_of("llama")).backward()
    optimizer.step()
    changed = {n for n, p in own(model).items() if not torch.equal(p, before[n])}
    assert all("layers.0." in n or "lora_B" in n for n in changed)  # B starts from zero
    assert {"layers.0." in n for n in changed} == {True, False}


@pytest.mark.filterwarnings("ignore:lozo. Adam has momentum")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by", ["backward", "misa"])
def test_a_hybrid_run_goes_on_after_a_save(dtype, by, tmp_path):
    def begin() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = make("plain").to(dtype)
        if by == "backward":
            surgery.apply(model, passes.Lozo(backward=UPPER, period=2))
        else:
            chosen = passes.Misa(budget=0.3, period=2, targets=r"blocks\.[12]\.(up|down)")
            surgery.apply(model, [passes.Lozo(targets=r"blocks\.0\..*", period=2), chosen])
        forwards = scalars(model)
        others = [p for p in model.parameters() if p is not forwards]
        groups = [{"params": [forwards], "lr": 1e-4}, {"params": others, "lr": 1e-3}]
        return model, torch.optim.Adam(groups)

    model, optimizer = begin()
    for seed in range(3):
        step(model, optimizer, "plain", seed)
    surgery.save(model, tmp_path, optimizer)
    resumed, again = begin()
    surgery.load(resumed, tmp_path, again)
    start = weights(model)
    for seed in range(3, 8):
        step(model, optimizer, "plain", seed)
        step(resumed, again, "plain", seed)
    for name, value in own(model).items():
        assert torch.equal(own(resumed)[name], value), name
    assert any(not torch.equal(p, start[n]) for n, p in own(model).items() if "blocks.0" in n)
    assert any(not torch.equal(p, start[n]) for n, p in own(model).items() if "blocks.1" in n)
    with pytest.raises(surgery.ModelError, match=r"trained by backward beside lozo.*surgery\.save"):
        surgery.journal(model)


def test_frozen_above_needs_no_backward():
    model = surgery.apply(make("plain"), passes.Mezo(backward=UPPER))
    method = method_of(model, TwoPoint)
    loss_of(model, inputs_of("plain")).backward()
    assert method.mixed
    for name in upper_of(model):
        model.get_parameter(name).requires_grad_(False)
    model.zero_grad()
    loss_of(model, inputs_of("plain")).backward()
    assert not method.mixed and scalars(model).grad is not None


def test_what_is_in_both_parts_and_what_is_in_none():
    with pytest.raises(
        surgery.TargetError, match=r"blocks\.1\.up\.weight.* in both targets= and back"
    ):
        surgery.apply(make("plain"), "mezo", targets=r"blocks\.1\..*", backward=UPPER)
    with pytest.raises(surgery.TargetError, match=r"mezo: backward.*nowhere|nowhere"):
        surgery.apply(make("plain"), "mezo", backward=["nowhere"])
    frozen = make("plain")
    frozen.blocks[2].requires_grad_(False)
    with pytest.raises(surgery.TargetError, match="no trainable weight among backward="):
        surgery.apply(frozen, "mezo", backward=r"blocks\.2\..*")
    with pytest.raises(surgery.TargetError, match="no trainable weight among the targets"):
        surgery.apply(make("plain"), "mezo", backward=".*")
    with pytest.raises(surgery.OptionError, match=r"conservative. does not go with backward="):
        surgery.apply(make("plain"), "mezo", backward=UPPER, update="conservative")
    both = [passes.Mezo(targets=["embed"], update="conservative"), passes.BAdam()]
    model = surgery.apply(make("plain"), both)
    with pytest.raises(surgery.ModelError, match="beside weights that are trained by backward"):
        loss_of(model, inputs_of("plain"))
    with pytest.raises(surgery.ConflictError, match=r"mezo and badam both train blocks\.0"):
        surgery.apply(make("plain"), [passes.Mezo(), passes.BAdam()])


def test_a_report_names_what_the_backward_above_keeps():
    ids = torch.randint(0, 64, (4, 64))
    batch = {"input_ids": ids, "labels": ids}
    planned = surgery.plan(llama(), batch, passes.Mezo(backward=UPPER_HALF)).after
    model = surgery.apply(llama(), passes.Mezo(backward=UPPER_HALF))
    found = surgery.report(model, batch)
    for what in ("parameters", "gradients", "optimizer", "activations"):
        assert getattr(found.after, what) == getattr(planned, what), what
    lines = dict(found.lines)
    assert lines["by backward"].startswith("18 weights")
    assert lines["forwards"] == "3 for each batch (central), one of them kept"
    kept = str(found)
    assert "2 x silu" in kept and "6 x silu" not in kept


def test_two_optimizers_step_the_two_parts():
    runs = []
    for order in (1, -1):
        model = surgery.apply(make("plain"), passes.Mezo(backward=UPPER))
        forwards = scalars(model)
        upper = [p for p in model.parameters() if p is not forwards and p.requires_grad]
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.SGD([forwards], lr=1e-3),
            torch.optim.Adam(upper, lr=1e-3),
        ][::order]
        for seed in range(3):
            loss_of(model, inputs_of("plain", seed=seed)).backward()
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
        assert method_of(model, TwoPoint).step == 3
        runs.append(weights(model))
    for name, value in runs[0].items():
        assert torch.equal(runs[1][name], value), name
