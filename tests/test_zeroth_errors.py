"""Bad input of the zeroth-order passes, and what is said about it."""

from __future__ import annotations

import pytest
import torch
from laws import anatomy, own, weights
from models import inputs_of, loss_of, make
from torch import nn

import passes
import surgery
from surgery.zeroth_order.options import eps_of

LORA = ".*lora_.*"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mezo", {"eps": 0.0}, r"mezo: eps=0.0 must be positive"),
        ("mezo", {"eps": float("nan")}, "eps=nan must be positive"),
        ("mezo", {"directions": 0}, "directions=0 must be at least 1"),
        ("mezo", {"noise": "uniform"}, "noise='uniform'"),
        ("mezo", {"estimate": "both"}, "estimate='both'"),
        ("mezo", {"weight_decay": -1.0}, "weight_decay=-1.0 must be >= 0"),
        ("sparse_mezo", {"keep_fraction": 0.0}, r"keep_fraction=0.0 must lie in \(0, 1\]"),
        ("sparse_mezo", {"keep_fraction": 1.5}, "keep_fraction=1.5"),
        ("sparse_mezo", {"period": 0}, "period=0 must be at least 1 step"),
        ("sparse_mezo", {"weight_decay": 0.1}, "no option 'weight_decay'"),
        ("lozo", {"rank": 0}, "rank=0 must be at least 1"),
        ("subzero", {"period": 0}, "period=0"),
    ],
)
def test_bad_options(name, options, message):
    model = make("plain")
    before = anatomy(model)
    with pytest.raises(surgery.OptionError, match=message):
        surgery.apply(model, name, **options)
    assert anatomy(model) == before


def test_quantised_weights_are_refused_by_name():
    model = make("plain")
    codes = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    model.blocks[1].register_parameter("codes", codes)
    surgery.remove(surgery.apply(model, "mezo"))  # they require no gradient: not among the targets
    with pytest.raises(surgery.TargetError, match=r"blocks\.1\.codes is quantised \(.*int8"):
        surgery.apply(model, "mezo", targets=["blocks.1.codes", "head"])
    model.blocks[1].float8 = nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn))
    with pytest.raises(surgery.TargetError, match=r"blocks\.1\.float8 is torch.float8_e4m3fn"):
        surgery.apply(model, "mezo")


def test_nothing_to_train():
    model = make("plain").requires_grad_(False)
    with pytest.raises(surgery.TargetError, match="requires_grad was not switched off"):
        surgery.apply(model, "mezo")
    with pytest.raises(surgery.TargetError, match="nowhere"):
        surgery.apply(make("plain"), "mezo", targets=["nowhere"])


@pytest.mark.parametrize("other", [passes.Rso(rank=4), passes.Recompute(), passes.Lozo()])
def test_other_passes_have_nothing_to_work_on(other):
    model = make("plain")
    before = anatomy(model)
    with pytest.raises(
        surgery.ConflictError, match=rf"forwards alone.* so {other.name} has nothing"
    ):
        surgery.apply(model, [passes.Mezo(), other])
    assert anatomy(model) == before


def test_an_output_without_a_floating_tensor():
    class Argmax(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).argmax(-1)

    model = surgery.apply(Argmax(), "mezo")
    with pytest.raises(surgery.ModelError, match="a Tensor, has no floating tensor"):
        model(torch.randn(2, 4))


def test_a_loss_that_does_not_depend_on_the_output():
    model = surgery.apply(nn.Sequential(nn.Linear(4, 3)), "mezo")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = weights(model)
    other = torch.ones((), requires_grad=True)
    (model(torch.randn(2, 4)).detach().sum() + other).backward()
    with pytest.raises(surgery.OptimizerError, match="does not depend on the model's output"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in own(model).items())


def test_backward_twice_on_one_output():
    model = surgery.apply(nn.Sequential(nn.Linear(4, 3)), "mezo")
    y = model(torch.randn(2, 4))
    y.sum().backward()
    with pytest.raises(surgery.SurgeryError, match=r"twice on one output.*Run the model again"):
        y.sum().backward()
    y = model(torch.randn(2, 4))
    model(torch.randn(2, 4)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(surgery.SurgeryError, match="an output of an earlier step"):
        y.sum().backward()


def test_momentum_on_scalars_of_changing_directions_warns():
    for build, options in (
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.AdamW, {"weight_decay": 0.0}),
    ):
        model = surgery.apply(nn.Sequential(nn.Linear(4, 3)), "mezo")
        optimizer = build(model.parameters(), lr=0.1, **options)
        model(torch.randn(2, 4)).sum().backward()
        with pytest.warns(UserWarning, match=r"other directions after each step.*dense=True"):
            optimizer.step()
        assert not optimizer.state


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("mezo", r'surgery\.apply\(model, "mezo", weight_decay=0\.1\), and weight_decay=0'),
        ("subzero", r'surgery\.apply\(model, "subzero", weight_decay=0\.1\)'),
        ("sparse_mezo", "has none of its own: give weight_decay=0 to the optimizer"),
    ],
)
def test_an_optimizer_whose_weight_decay_does_nothing_warns(name, way):
    model = surgery.apply(nn.Sequential(nn.Linear(4, 3)), name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    model(torch.randn(2, 4)).sum().backward()
    with pytest.warns(UserWarning, match=f"the weight_decay of SGD.*{way}"):
        optimizer.step()


def test_a_gradient_of_zero_in_twenty_steps_warns():
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * 0.0

    model = surgery.apply(Constant(), "mezo")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2, 4)
    for step in range(20):
        model(x).sum().backward()
        if step < 19:
            optimizer.step()
            optimizer.zero_grad()
    with pytest.warns(UserWarning, match="exactly the same in 20 steps running. eps=0.001"):
        optimizer.step()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_slope_that_is_not_finite_changes_nothing(bad):
    model = surgery.apply(make("plain"), "mezo")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = weights(model)
    (loss_of(model, inputs_of("plain")) * bad).backward()
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in own(model).items())
    assert dict(surgery.report(model).lines)["skipped steps"].startswith("1, ")
    optimizer.zero_grad()
    loss_of(model, inputs_of("plain")).backward()
    optimizer.step()
    assert surgery.journal(model).shape == (1, 2)
    assert any(not torch.equal(p, before[n]) for n, p in own(model).items())


def test_eps_by_kind_of_target():
    assert eps_of(["a.weight", "b.bias"]) == 1e-3
    assert eps_of(["a.lora_A.default.weight", "a.lora_B.default.weight"]) == 1e-2
    assert eps_of(["prompt_encoder.default.embedding.weight"]) == 1e-1
    assert eps_of(["a.lora_A.default.weight", "a.weight"]) == 1e-3


@pytest.mark.filterwarnings("ignore")  # peft's own
def test_lora_weights_are_targets():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
    model = peft.get_peft_model(make("llama"), config)
    surgery.apply(model, "mezo")
    assert {"lora_A", "lora_B"} <= {
        part for c in surgery.coordinates(model) for part in c.weight.split(".")
    }
    assert all("lora_" in c.weight for c in surgery.coordinates(model))
    assert "eps 0.01" in dict(surgery.report(model).lines)["perturbed"]
    before, optimizer = weights(model), torch.optim.SGD(model.parameters(), lr=1e-2)
    loss_of(model, inputs_of("llama")).backward()
    optimizer.step()
    moved = {n for n, p in own(model).items() if not torch.equal(p, before[n])}
    assert moved == {c.weight for c in surgery.coordinates(model)}
    surgery.remove(model)
    surgery.apply(model, "mezo", targets=LORA)
    assert all("lora_" in c.weight for c in surgery.coordinates(model))


@pytest.mark.parametrize("first", ["lower", "upper"])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_changes_nothing_under_two_optimizers(first, factor):
    model = surgery.apply(make("plain"), passes.Mezo(backward=r"blocks\.[12]\..*|final.*|norm.*"))
    found = {id(c.parameter): c.parameter for c in surgery.coordinates(model)}.values()
    lower = torch.optim.SGD([p for p in found if p.numel() == 1], lr=1e-4)
    upper = torch.optim.AdamW([p for p in found if p.numel() > 1], lr=1e-3)
    both = (lower, upper) if first == "lower" else (upper, lower)
    for n, scale in enumerate((1.0, factor, 1.0)):
        before = weights(model)
        (loss_of(model, inputs_of("plain", seed=n)) * scale).backward()
        for optimizer in both:
            optimizer.step()
        for optimizer in both:
            optimizer.zero_grad()
        same = [torch.equal(before[name], p) for name, p in own(model).items()]
        assert all(same) if n == 1 else not any(same)
    assert dict(surgery.report(model).lines)["optimizer steps"] == "2"
