"""Flat-LoRA beside the paper's equation written densely: a copy of the model with W + eps."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from laws import adamw, adapted, case, method_of, own
from models import Broken, adapt, inputs_of, layers, loss_of, make
from peft import PeftModel
from test_export import same_outputs
from torch import Tensor, nn

import passes
import surgery
import surgery.testing
from passes.flat_lora import Noising
from surgery import noise
from surgery.kernels import directions, plan
from surgery.memory import measure

RHO = 0.3


def adapters_of(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and "lora" not in n}


def eps(name: str, layer: Any, step: int, c: float, seed: int = 0) -> Tensor:
    """The noise of one weight, whole."""
    weight = layer.base_layer.weight.detach()
    turned = getattr(layer, "fan_in_fan_out", False)
    merged = weight + sum(layer.get_delta_weight(a).detach() for a in layer.active_adapters)
    key = noise.bits(seed, "flat_lora", name, step)
    z = directions.direction("gaussian", 0, weight.numel(), key).view(weight.shape).to(weight.dtype)
    dim = 0 if turned else 1  # of the inputs
    sigma = c * RHO * merged.norm(dim=dim, keepdim=True) / math.sqrt(weight.shape[dim])
    return sigma * z


def dense_step(model: nn.Module, family: str, seed: int, step: int, c: float) -> Tensor:
    """A training forward and backward of the equation, by plain PyTorch; W is put back."""
    before = {n: m.base_layer.weight.detach().clone() for n, m in adapters_of(model).items()}
    with torch.no_grad():
        for name, layer in adapters_of(model).items():
            layer.base_layer.weight += eps(name, layer, step, c)
    loss = loss_of(model, inputs_of(family, seed=seed))
    loss.backward()
    with torch.no_grad():
        for name, layer in adapters_of(model).items():
            layer.base_layer.weight.copy_(before[name])
    return loss


CASES = {
    "one graph for all blocks": lambda: adapt(Broken(), "lora on plain"),
    "llama": lambda: adapted("llama"),
    "gpt2, (in, out)": lambda: adapted("gpt2"),
    "every Linear": lambda: adapt(make("llama"), "on every Linear"),
    "two adapters": lambda: adapt(make("llama"), "two adapters"),
    "biases": lambda: adapt(make("opt"), "trained biases"),
    "checkpointed": lambda: checkpointed(),
}


def checkpointed() -> nn.Module:
    model: Any = adapt(make("llama", num_hidden_layers=2), "lora")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@pytest.mark.parametrize("form", ["cpu", "accelerator"])
@pytest.mark.parametrize("kind", CASES)
def test_steps_are_those_of_the_equation(kind, form, monkeypatch):
    """In pieces of 3 rows, or all at once; with AdamW, beside a reference that is stepped alike."""
    if form == "cpu":
        monkeypatch.setattr(plan, "CPU", plan.Plan(**vars(plan.CPU) | {"drawn": 100}))
    family = {"gpt2, (in, out)": "gpt2", "biases": "opt"}.get(kind, "llama")
    family = "plain" if "one graph" in kind else family
    ours = CASES[kind]().double().eval()  # without dropout
    plain = copy.deepcopy(ours)
    surgery.apply(ours.train(), passes.FlatLora(rho=RHO, steps=3))
    ours.eval()
    both = [adamw(model, lr=1e-2) for model in (ours, plain)]
    base = {n: p.detach().clone() for n, p in ours.named_parameters() if not p.requires_grad}
    for step in range(5):
        c = (1 - math.cos(math.pi * min(step / 3, 1))) / 2
        expected = dense_step(plain, family, step, step, c)
        with plan.forced(form):
            found = loss_of(ours, inputs_of(family, seed=step))
            found.backward()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
        for name, parameter in plain.named_parameters():
            mine = own(ours)[name].grad
            assert (mine is None) == (parameter.grad is None), name
            if mine is not None:
                torch.testing.assert_close(mine, parameter.grad, rtol=1e-6, atol=1e-9, msg=name)
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    for name, weight in base.items():
        assert torch.equal(own(ours)[name], weight), name
    if "one graph" in kind:
        assert len(surgery.graphs(ours)) < 4


def test_noise_is_normal_and_as_large_as_the_paper_says():
    """E eps^2 of a row is (c rho norm(W'_i))^2 / n_in, over 600 steps."""
    model = adapted("llama").double()
    method = passes.FlatLora(rho=RHO).start(model)
    name, layer = next((n, m) for n, m in adapters_of(model).items() if "down" in n)
    weight, found = layer.base_layer.weight, []
    for method.step in range(600):
        sigma = method.sigma(name, weight, False)
        assert sigma is not None
        key = noise.bits(0, "flat_lora", name, method.step)
        z = directions.direction("gaussian", 0, weight.numel(), key)
        found.append(sigma[:, None] * z.view(weight.shape))
    merged = (weight + layer.get_delta_weight("default")).detach()
    expected = RHO * merged.norm(dim=1) / math.sqrt(weight.shape[1])
    drawn = torch.stack(found)
    assert drawn.mean().abs() < 4 * expected.mean() / math.sqrt(drawn.numel())
    off = drawn.square().mean((0, 2)) / expected.square() - 1
    assert off.abs().max() < 5 * math.sqrt(2 / (600 * weight.shape[1]))
    kurtosis = (drawn / expected[:, None]).pow(4).mean()
    assert abs(float(kurtosis) - 3) < 0.03


def test_the_first_step_of_a_schedule_is_loras():
    plain, ours = adapted("llama"), adapted("llama")
    surgery.apply(ours, passes.FlatLora(steps=10))
    for model in (plain, ours):
        loss_of(model, inputs_of("llama")).backward()
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(own(ours)[name].grad, parameter.grad), name


def test_noise_is_one_for_a_step_and_another_for_the_next():
    model = surgery.apply(adapted("plain"), passes.FlatLora(rho=RHO))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def loss() -> float:
        return loss_of(model, inputs_of("plain")).item()

    first = loss()
    assert loss() == first
    loss_of(model, inputs_of("plain")).backward()
    optimizer.step()
    assert loss() != first


@pytest.mark.parametrize("how", ["disabled", "merged"])
def test_without_its_adapters_a_weight_gets_no_noise(how):
    model: Any = adapted("llama")
    plain: Any = adapted("llama")
    surgery.apply(model, passes.FlatLora(rho=RHO))
    outputs = []
    for each in (plain, model):
        if how == "merged":
            each.merge_adapter()
            outputs.append(loss_of(each, inputs_of("llama")))
            each.unmerge_adapter()
        else:
            with each.disable_adapter():
                outputs.append(loss_of(each, inputs_of("llama")))
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bases_of_16_bits_and_autocast(dtype):
    """The noise is drawn in float32 and rounded once, with W, to what the product is taken in."""
    exact, narrow, cast = adapted("llama"), adapted("llama"), adapted("llama")
    with torch.no_grad():
        for name, p in narrow.named_parameters():
            if "lora" not in name:
                p.data = p.data.to(dtype)
                own(exact)[name].copy_(p)
                own(cast)[name].copy_(p)
    losses, grads = [], []
    for model in (exact, narrow, cast):
        surgery.apply(model, passes.FlatLora(rho=RHO))
        with torch.autocast("cpu", dtype, enabled=model is cast):
            loss = loss_of(model, inputs_of("llama"))
        loss.backward()
        losses.append(loss.item())
        grads.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=0.01)
    for grad in grads[1:]:
        assert torch.nn.functional.cosine_similarity(grad, grads[0], dim=0) > 0.99


def test_nothing_of_a_weights_size_is_kept():
    """Deviations of rows, and a temporary of one product."""
    kept = {}
    for name in ("lora", "flat_lora"):
        model = adapt(make("llama", hidden_size=256, intermediate_size=512), "lora")
        if name == "flat_lora":
            surgery.apply(model, "flat_lora")
        loss_of(model, inputs_of("llama")).backward()
        kept[name] = measure(lambda m=model: loss_of(m, inputs_of("llama")), torch.device("cpu"))
    rows = sum(layer.base_layer.weight.shape[0] for layer in adapters_of(model).values())
    assert kept["flat_lora"].live - kept["lora"].live <= 4 * rows + 1024


def test_checkpoints_have_no_noise(tmp_path):
    model: Any = surgery.apply(adapted("llama"), passes.FlatLora(rho=RHO))
    base = make("llama")
    optimizer = adamw(model)
    for seed in range(3):
        loss_of(model, inputs_of("llama", seed=seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "saved")
    surgery.export(model, tmp_path / "exported")
    for folder in (tmp_path / "saved", tmp_path / "exported" / "adapters"):
        same_outputs(model, PeftModel.from_pretrained(copy.deepcopy(base), folder), "llama")


def test_two_processes_take_the_step_of_one():
    """The noise is that of the seed on every rank, of the whole W under FSDP2."""
    surgery.testing.two_ranks(
        surgery.testing.Case(
            spec=passes.FlatLora(rho=RHO),
            model=case("flat_lora", "plain").model,
            inputs=case("flat_lora", "plain").inputs,
        )
    )


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: make("llama"), surgery.TargetError, r"Linear with LoRA.* peft\.get_peft_model"),
        (lambda: adapt(make("llama"), "dora"), surgery.TargetError, "not plain LoRA .*use_dora"),
        (lambda: opened(adapted("llama")), surgery.TargetError, "base_layer is not frozen"),
    ],
    ids=["none", "dora", "trained"],
)
def test_what_has_no_place_for_noise_is_refused(model, error, message):
    with pytest.raises(error, match=message):
        surgery.apply(model(), "flat_lora")


def opened(model: nn.Module) -> nn.Module:
    for layer in adapters_of(model).values():
        layer.base_layer.weight.requires_grad_(True)
    return model


def test_a_weight_that_is_switched_on_later_is_refused():
    model = surgery.apply(adapted("llama"), "flat_lora")
    loss_of(model, inputs_of("llama")).backward()
    opened(model)
    with pytest.raises(surgery.SurgeryError, match="base_layer"):
        loss_of(model, inputs_of("llama")).backward()


def test_targets_choose_among_the_linears_with_adapters():
    model = surgery.apply(adapted("llama"), passes.FlatLora(targets=["q_proj"]))
    assert [n.rpartition(".")[2] for n in method_of(model, Noising).layers] == ["q_proj"]
    loss_of(model, inputs_of("llama")).backward()
    with pytest.raises(surgery.TargetError, match="no target is a floating-point Linear with LoRA"):
        surgery.apply(adapted("llama"), passes.FlatLora(targets=["k_proj"]))


@pytest.mark.parametrize("options", [{"rho": -1.0}, {"rho": math.inf}, {"steps": 0}], ids=str)
def test_options_are_checked(options):
    with pytest.raises(surgery.OptionError, match=next(iter(options))):
        passes.FlatLora(**options)


@pytest.mark.parametrize(
    "other", ["recompute", "chunked_loss", "compress", passes.Misa(budget=1.0)]
)
def test_in_company_the_step_is_the_same(other):
    found = []
    for names in (["flat_lora"], ["flat_lora", other], [other, "flat_lora"]):
        model = surgery.apply(adapted("llama", **layers("llama", 2)), names)
        loss = loss_of(model, inputs_of("llama"))
        loss.backward()
        grads = [p.grad.flatten() for p in own(model).values() if p.grad is not None]
        found.append((loss.item(), torch.cat(grads)))
    for loss, grad in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        if other == "compress":  # right on average
            assert torch.nn.functional.cosine_similarity(grad, found[0][1], dim=0) > 0.999
        else:
            torch.testing.assert_close(grad, found[0][1], rtol=1e-4, atol=1e-7)
