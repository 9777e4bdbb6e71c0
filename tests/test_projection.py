"""What velora and rso share: inputs of every shape, stacked experts, bytes, and what is refused."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from laws import PASSES, method_of, state_of
from models import LAYERS, Wide, inputs_of, loss_of, make
from torch import nn

import passes
import surgery
from passes.rso import Subspaces
from surgery.memory import measure

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "chosen", [passes.Velora(groups=16, targets=["0"]), passes.Rso(rank=16, targets=["0"])]
)
def test_no_x_is_kept_and_none_is_formed_again(chosen):
    model = surgery.apply(Wide(4096), chosen)
    x = torch.randn(1000, 4096)
    model(x).backward()
    forward = measure(lambda: model(x), CPU)
    assert forward.live < x.nbytes / 20
    backward = measure(forward.result.backward, CPU, after=forward)
    assert backward.peak < x.nbytes / 20


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(6, 512),
        torch.randn(2, 3, 512),
        torch.randn(2, 3, 2, 512),
        torch.randn(512, 6).t(),
        torch.randn(2, 512, 3).transpose(1, 2),
        torch.randn(512),
        torch.zeros(4, 512),
        torch.empty(0, 512),
        torch.empty(2, 0, 512),
    ],
    ids=["2-D", "3-D", "4-D", "transposed", "strided", "1-D", "zero", "empty", "empty 3-D"],
)
@pytest.mark.parametrize("chosen", [passes.Velora(groups=16), passes.Rso(rank=16)])
def test_inputs_of_every_shape(chosen, x):
    model, plain = Wide(), Wide()
    plain.load_state_dict(model.state_dict())
    surgery.apply(model, chosen)
    x = x.detach().requires_grad_()
    ours, theirs = model(x), plain(x)
    torch.testing.assert_close(ours, theirs)  # torch multiplies strided x in another order
    (dx,) = torch.autograd.grad(theirs, x)
    ours.backward()
    torch.testing.assert_close(x.grad, dx)
    (c,) = surgery.coordinates(model)
    assert c.parameter.grad.shape == (8, 16) and bool(c.parameter.grad.isfinite().all())


@pytest.mark.parametrize(
    ("chosen", "checkpointing"),
    [(passes.Velora(groups=2, init="random"), True), (passes.Rso(rank=2), False)],
)
def test_a_projected_weight_may_read_what_another_one_made(chosen, checkpointing):
    from peft import LoraConfig, get_peft_model

    model = make("llama")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    plain = copy.deepcopy(model)
    surgery.apply(model, chosen)
    found = {c.weight for c in surgery.coordinates(model)}
    assert len(found) == 2 * 7 * LAYERS  # A and, with more than 2 inputs, B too
    loss, expected = loss_of(model, inputs_of("llama")), loss_of(plain, inputs_of("llama"))
    assert torch.equal(loss, expected)
    loss.backward()
    assert all(c.parameter.grad is not None for c in surgery.coordinates(model))


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make_pass", [partial(passes.Velora, groups=4), partial(passes.Rso, rank=4)]
)
def test_tied_weights_are_refused_by_name(make_pass):
    with pytest.raises(surgery.TargetError, match=r"embed.weight is tied"):
        surgery.apply(make("plain"), make_pass(targets=["embed.weight"]))


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,oi->bo", x, self.layers[0].weight).sum()


@pytest.mark.parametrize("chosen", [passes.Velora(groups=4), passes.Rso(rank=4)])
def test_a_weight_that_no_linear_reads_is_refused_by_name(chosen):
    model = surgery.apply(Product(), chosen)
    with pytest.raises(surgery.CaptureError, match=r"layers\.0\.weight"):
        model(torch.randn(3, 16))


def test_two_velora_passes_on_one_input_project_it_twice():
    both = [passes.Velora(groups=g, targets=[t]) for g, t in ((4, "q_proj"), (8, "k_proj"))]
    model = surgery.apply(make("llama"), both)
    loss_of(model, inputs_of("llama")).backward()
    shapes = {c.weight.split(".")[-2]: c.parameter.grad.shape for c in surgery.coordinates(model)}
    assert shapes == {"q_proj": (32, 4), "k_proj": (16, 8)}


def quantised(kind: str, folder) -> nn.Module:
    import transformers

    if kind == "torchao int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        model = make("llama", hidden_size=64)
        quantize_(model.model.layers, Int8WeightOnlyConfig())
        return model
    make("llama", hidden_size=64).save_pretrained(folder)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=kind == "bitsandbytes 4-bit", load_in_8bit=kind == "bitsandbytes 8-bit"
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu"
    ).train()


@pytest.mark.filterwarnings("ignore")  # bitsandbytes and torchao announce their renamings
@pytest.mark.parametrize("kind", ["bitsandbytes 4-bit", "bitsandbytes 8-bit", "torchao int8"])
def test_under_quantised_bases_adapters_are_projected(kind, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = quantised(kind, tmp_path)
    with pytest.raises(surgery.TargetError, match=r"q_proj\.weight is quantised"):
        surgery.apply(model, passes.Velora(groups=8, targets=["q_proj"]))
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    inputs = inputs_of("llama")
    expected = loss_of(model, inputs)
    expected.backward()
    full = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    surgery.apply(model, [passes.Velora(groups=8), passes.Recompute(), passes.ChunkedLoss()])
    loss = loss_of(model, inputs)
    assert torch.equal(loss, expected)
    loss.backward()
    exact = [c for c in surgery.coordinates(model) if "lora_B" in c.weight]
    assert len(exact) == 7 * LAYERS
    for c in exact:
        torch.testing.assert_close(c.parameter.grad, full[c.weight], rtol=1e-4, atol=1e-6)


# -- stacked experts -------------------------------------------------------------------------------


def bases(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the P of each projected weight, (rank, in)."""
    return {p.weight: p.beside.frame.matrix.float() for p in method_of(model, Subspaces).projected}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16]
)  # transformers' loop, torch's kernel
def test_experts_gradients_are_those_of_the_equations(dtype):
    model = make("mixtral").to(dtype)
    plain = copy.deepcopy(model)
    surgery.apply(model, "rso", rank=4)
    inputs = inputs_of("mixtral")
    loss, expected = loss_of(model, inputs), loss_of(plain, inputs)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    found = {c.weight: c.parameter.grad for c in surgery.coordinates(model)}
    experts = [name for name in found if "experts" in name]
    assert len(experts) == 2 * LAYERS
    for name in experts:
        grad = plain.get_parameter(name).grad
        wanted = torch.einsum("eoi,ri->eor", grad.float(), bases(model)[name])
        assert found[name].shape == (4 * grad.shape[1], 4)
        scale = wanted.abs().max()
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        assert (found[name].view_as(wanted) - wanted).abs().max() <= bound * scale, name


def test_experts_weights_are_the_sum_of_all_steps():
    model = make("mixtral")
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    surgery.apply(model, "rso", rank=4, period=100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for seed in range(3):
        loss_of(model, inputs_of("mixtral", seed=seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for c in surgery.coordinates(model):
        weight = model.get_parameter(c.weight)
        b = c.parameter.detach().view(*weight.shape[:-1], 4)
        expected = start[c.weight] + torch.einsum("...or,ri->...oi", b, bases(model)[c.weight])
        torch.testing.assert_close(weight.detach(), expected)
        torch.testing.assert_close(
            c.expand(c.parameter.detach()), weight.detach() - start[c.weight]
        )


def test_of_experts_only_the_projected_rows_are_kept():
    options = dict(hidden_size=64, intermediate_size=160)
    plain = make("mixtral", **options)
    model = surgery.apply(copy.deepcopy(plain), "rso", rank=4)
    inputs = inputs_of("mixtral", rows=4, length=32)
    loss_of(model, inputs)
    found = surgery.report(model, inputs)
    live = measure(lambda: loss_of(model, inputs), CPU).live
    assert found.after.activations == live
    rows = 4 * 32 * 2  # each token goes to two experts
    eager = measure(lambda: loss_of(plain, inputs), CPU).live
    # gone at least: what both products of the experts read, but for its 4 projections
    assert eager - live >= LAYERS * rows * (64 + 160 - 2 * 4) * 4


def test_velora_leaves_experts_frozen_and_refuses_them_by_name():
    model = surgery.apply(make("mixtral"), "velora", groups=4)
    assert not any("experts" in c.weight for c in surgery.coordinates(model))
    with pytest.raises(surgery.TargetError, match=r"experts\.down_proj belongs to MixtralExperts"):
        surgery.apply(make("mixtral"), passes.Velora(groups=4, targets=["experts.down_proj"]))


def test_experts_computed_in_another_way_are_an_error():
    model = make("mixtral")
    model.set_experts_implementation("batched_mm")
    surgery.apply(model, "rso", rank=4)
    with pytest.raises(surgery.CaptureError, match=r'set_experts_implementation\("grouped_mm"\)'):
        loss_of(model, inputs_of("mixtral"))


@pytest.mark.parametrize("kind", ["rso", "velora"])
def test_coordinates_stay_wide_when_the_model_moves(kind):
    model = surgery.apply(make("plain"), PASSES[kind]())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model.to(dtype)
        loss_of(model, inputs_of("plain")).backward()
        optimizer.step()
        optimizer.zero_grad()
        wide = torch.promote_types(dtype, torch.float32)
        assert {c.parameter.dtype for c in surgery.coordinates(model)} == {wide}
    assert state_of(model).clock.step == 3


def test_a_linear_that_names_its_arguments_is_one():
    """`F.linear(x, weight=W)`: what works on Linears reaches it, and its gradients are the same."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x):
            x = nn.functional.linear(x, bias=self.up.bias, weight=self.up.weight)
            return nn.functional.linear(input=x.relu(), weight=self.down.weight).square().sum()

    torch.manual_seed(0)
    model, x = Named(), torch.randn(3, 8)
    model(x).backward()
    dense = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    surgery.apply(model, passes.Rso(rank=4))
    model(x).backward()
    for c in surgery.coordinates(model):
        e = torch.randn_like(c.parameter)
        expected = (dense[c.weight] * c.expand(e)).sum()
        torch.testing.assert_close((c.parameter.grad * e).sum(), expected, rtol=1e-4, atol=1e-4)
