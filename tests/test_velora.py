"""velora: the paper's equations written densely, PEFT's own VeLoRA, bytes, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from laws import method_of, optimizer_of, run_two_ranks
from models import LAYERS, Wide, inputs_of, loss_of, make
from torch import nn
from torch.nn import functional

import passes
import surgery
from passes.velora import SubTokens
from surgery.memory import measure
from surgery.weights.modules import is_linear_module, is_transposed

CPU = torch.device("cpu")


def vectors(model: nn.Module) -> dict[str, torch.Tensor]:
    projected = method_of(model, SubTokens).projected
    return {p.weight: p.beside.direction.of(torch.ones(1, 1)) for p in projected}


def dense_inputs_and_grads(model: nn.Module, inputs) -> dict[str, tuple[torch.Tensor, ...]]:
    """Return x and dL/dy of every Linear of a plain model, by the name of its weight."""
    found: dict[str, list[torch.Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if is_linear_module(module):
            own = found.setdefault(f"{name}.weight", [])
            handles += [
                module.register_forward_hook(lambda _, x, y, o=own: o.append(x[0].detach())),
                module.register_full_backward_hook(lambda _, dx, g, o=own: o.append(g[0])),
            ]
    loss_of(model, inputs).backward()
    for handle in handles:
        handle.remove()
    return {n: tuple(t.reshape(-1, t.shape[-1]) for t in own) for n, own in found.items()}


def kronecker(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """x (I_G ⊗ v), with x padded to a multiple of len(v)."""
    x = functional.pad(x, (0, -x.shape[1] % len(v)))
    return x @ torch.kron(torch.eye(x.shape[1] // len(v)).to(x), v[:, None].to(x))


@pytest.mark.parametrize(  # 7 divides neither 32 nor 80
    ("family", "groups", "dense"),
    [
        ("llama", 4, False),
        ("llama", 7, True),
        ("gpt2", 7, False),
        ("gpt2", 4, True),
        ("bert", 4, False),
        ("bert", 7, True),
    ],
)
def test_gradients_are_those_of_the_equations(family, groups, dense):
    plain = make(family).eval().double()
    model = copy.deepcopy(plain)
    inputs = inputs_of(family)
    expected = dense_inputs_and_grads(plain, inputs)
    surgery.apply(model, "velora", groups=groups, init="random", dense=dense, scale=0.5)
    loss_of(model, inputs).backward()
    v = vectors(model)
    assert len(v) >= 4 * LAYERS
    for c in surgery.coordinates(model):
        x, g = expected[c.weight]
        small = 0.5 * g.t() @ kronecker(x, v[c.weight].double())
        want = small
        if dense:
            want = (small[..., None] * v[c.weight].double()).flatten(1)[:, : x.shape[1]]
            if is_transposed(model.get_submodule(c.weight.removesuffix(".weight"))):
                want = want.t()
        assert c.parameter.shape == want.shape
        torch.testing.assert_close(c.parameter.grad, want, rtol=1e-6, atol=1e-9, msg=c.weight)


class Adapter(nn.Module):
    """y = W_0 x + b + A C(x), C = I_G ⊗ v frozen, A from zero."""

    def __init__(self, linear: nn.Linear, v: torch.Tensor) -> None:
        super().__init__()
        self.linear, self.v = linear, v
        self.a = nn.Parameter(torch.zeros(linear.out_features, linear.in_features // len(v)))
        self.a.data = self.a.data.to(linear.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return self.linear(x) + (kronecker(flat, self.v) @ self.a.t()).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_it_is_the_frozen_projection_adapter(kind):
    plain = make("llama").double()
    model = surgery.apply(copy.deepcopy(plain), "velora", groups=4, init="random")
    loss_of(model, inputs_of("llama"))
    adapters = {}
    plain.requires_grad_(False)
    for name, v in vectors(model).items():
        path = name.removesuffix(".weight")
        parent, _, own = path.rpartition(".")
        adapters[name] = Adapter(plain.get_submodule(path), v.double())
        setattr(plain.get_submodule(parent), own, adapters[name])
    ours = optimizer_of(kind, model.parameters(), lr=0.1)
    theirs = optimizer_of(kind, [a.a for a in adapters.values()], lr=0.1)
    for seed in range(15):
        inputs = inputs_of("llama", seed=seed)
        losses = [loss_of(m, inputs) for m in (model, plain)]
        assert abs(losses[0] - losses[1]) < 1e-12
        for loss, optimizer in zip(losses, (ours, theirs), strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, adapter in adapters.items():
        change = (adapter.a[..., None] * adapter.v).flatten(1)
        weight = adapter.linear.weight + change
        assert (model.get_parameter(name) - weight).abs().max() < 1e-12, name
        assert change.abs().max() > 1e-4


def test_pefts_velora_where_they_coincide():
    from peft import LoraConfig, VeloraConfig, get_peft_model

    def adapted(**options):
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], **options)
        return get_peft_model(make("llama"), config)

    theirs = adapted(
        velora_config=VeloraConfig(num_groups=8, scale=0.3, init_type="batch_average_once")
    )
    ours = adapted()
    for (name, a), (_, b) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        b.data.copy_(a.data)
        if "lora_B" in name:
            a.data.normal_(generator=torch.Generator().manual_seed(2))
            b.data.copy_(a.data)
    surgery.apply(ours, "velora", groups=8, dense=True, scale=0.3)
    inputs = inputs_of("llama")
    losses = [loss_of(m, inputs) for m in (theirs, ours)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    compared = 0
    for (name, a), (_, b) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        if a.grad is not None:
            compared += 1
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-8, msg=name)
    assert compared == 2 * 3 * LAYERS


def test_on_adapters_a_is_projected_and_b_trained_densely():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make("llama"), LoraConfig(r=4, target_modules="all-linear"))
    surgery.apply(model, "velora", groups=8)
    loss_of(model, inputs_of("llama")).backward()
    for c in surgery.coordinates(model):
        assert c.parameter.shape[1] == (8 if "lora_A" in c.weight else 4), c.weight
        assert c.parameter.grad is not None
    assert len(surgery.coordinates(model)) == 2 * 7 * LAYERS


def test_one_z_for_all_weights_that_read_the_same_x():
    model = surgery.apply(make("llama"), "velora", groups=4)
    found = surgery.report(model, inputs_of("llama", rows=2, length=12))
    z = [kept for kept in found.kept if kept.made_by == "project"]
    # q, k and v; o; gate and up; down: four in each block
    assert sum(kept.count for kept in z) == 4 * LAYERS
    assert sum(kept.bytes for kept in z) == 4 * LAYERS * (2 * 12) * 4 * 4
    v = taken(model)
    assert all(vector is None for vector in v)  # a report draws nothing


def taken(model: nn.Module) -> list:
    return [piece.beside.direction.vector for piece in method_of(model, SubTokens).projected]


def test_bytes_are_the_allocators():
    model = surgery.apply(make("llama"), "velora", groups=4)
    inputs = inputs_of("llama", rows=4, length=32)
    loss_of(model, inputs)  # takes v, which stays
    found = surgery.report(model, inputs)
    assert found.after.activations == measure(lambda: loss_of(model, inputs), CPU).live
    kept = sum(k.bytes for k in found.kept)
    assert abs(kept - found.after.activations) <= 0.005 * found.after.activations
    count = sum(c.parameter.numel() for c in surgery.coordinates(model))
    assert (found.after.gradients, found.after.optimizer) == (4 * count, 8 * count)


def test_v_after_a_batch_of_nothing_comes_from_the_next():
    model = surgery.apply(Wide(), passes.Velora(groups=16))
    model(torch.empty(0, 512))
    assert taken(model) == [None]
    x = torch.randn(5, 512) + 1
    model(x)
    mean = functional.normalize(x.view(-1, 32).mean(0), dim=0)
    torch.testing.assert_close(taken(model)[0], mean)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mean_leaves_padding_out(side):
    model = surgery.apply(make("llama"), "velora", groups=4)
    inputs = inputs_of("llama", padding=side)
    hidden = model.model.embed_tokens(inputs["input_ids"])
    x = model.model.layers[0].input_layernorm(hidden)[inputs["attention_mask"] == 1]
    loss_of(model, inputs).backward()
    v = vectors(model)
    expected = functional.normalize(x.reshape(-1, 8).mean(0), dim=0)
    for name in ("q", "k", "v"):
        torch.testing.assert_close(v[f"model.layers.0.self_attn.{name}_proj.weight"], expected)
    before = {name: vector.clone() for name, vector in v.items()}
    loss_of(model, inputs_of("llama", seed=9)).backward()
    assert all(torch.equal(vector, before[name]) for name, vector in vectors(model).items())
    assert all(abs(float(vector.norm()) - 1) < 1e-6 for vector in before.values())


@pytest.mark.parametrize("init", ["mean", "random"])
def test_v_is_drawn_anew_each_period(init):
    model = surgery.apply(make("llama"), "velora", groups=4, init=init, period=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = []
    for seed in range(7):
        loss_of(model, inputs_of("llama", seed=seed)).backward()
        seen.append({name: vector.clone() for name, vector in vectors(model).items()})
        optimizer.step()
        optimizer.zero_grad()
        if seed % 3 == 2:
            assert not any(optimizer.state.values())
            assert all(not c.parameter.any() for c in surgery.coordinates(model))
    for name in seen[0]:
        same = [torch.equal(seen[0][name], later[name]) for later in seen]
        assert same == [True] * 3 + [False] * 4, name
    assert dict(surgery.report(model).lines)["round"] == "2, step 1 of 3"


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = make("llama")
        if options:
            model.gradient_checkpointing_enable(options)
        surgery.apply(model, "velora", groups=4)
        loss_of(model, inputs_of("llama")).backward()
        assert {p.weight for p in method_of(model, SubTokens).projected if p.reached} == {
            p.weight for p in method_of(model, SubTokens).projected
        }
        gradients.append({c.weight: c.parameter.grad for c in surgery.coordinates(model)})
    for other in gradients[1:]:
        for name, grad in gradients[0].items():
            torch.testing.assert_close(other[name], grad, msg=name)


def test_under_autocast():
    plain = make("llama")
    model = copy.deepcopy(plain)
    inputs = inputs_of("llama")
    surgery.apply(model, "velora", groups=4, init="random")
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss_of(plain, inputs)
        loss = loss_of(model, inputs)
    assert torch.equal(loss, expected)
    loss.backward()
    half = {c.weight: c.parameter.grad.clone() for c in surgery.coordinates(model)}
    model.zero_grad()
    loss_of(model, inputs).backward()
    for c in surgery.coordinates(model):
        assert (half[c.weight] - c.parameter.grad).norm() < 0.05 * c.parameter.grad.norm()


def test_small_steps_are_not_lost_in_bfloat16():
    model = make("llama").bfloat16()
    surgery.apply(model, "velora", groups=4, init="random")
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss_of(model, inputs_of("llama"))
    delta = 1e-5  # 40 of these make one step of bfloat16 at 0.05
    for _ in range(100):
        for c in surgery.coordinates(model):
            assert c.parameter.dtype == torch.float32
            c.parameter.grad = torch.full_like(c.parameter, -delta)
        optimizer.step()
    for c in surgery.coordinates(model):
        weight = model.get_parameter(c.weight)
        assert weight.dtype == torch.bfloat16
        wanted = c.expand(torch.full_like(c.parameter.detach(), 100 * delta)).double()
        moved = weight.detach().double() - start[c.weight].double()
        share = float((moved * wanted).sum() / wanted.square().sum())
        assert 0.8 < share < 1.2, c.weight


def test_it_says_where_it_saves_nothing():
    model = surgery.apply(make("llama"), "velora", groups=4)
    loss_of(model, inputs_of("llama"))  # by default in the report only
    lines = dict(surgery.report(model).lines)
    assert (
        "o_proj.weight (its input is kept for scaled_dot_product_attention)"
        in (lines["no activations saved"])
    )
    assert "q_proj" not in lines["no activations saved"]


def test_it_warns_of_some_readers_of_an_input():
    beside = passes.Misa(budget=1.0, targets=["q_proj", "k_proj"])
    spec = [passes.Velora(groups=4, targets=["v_proj"]), beside]
    model = surgery.apply(make("llama"), spec)
    with pytest.warns(UserWarning, match=r"v_proj.weight .its input is kept for linear"):
        loss_of(model, inputs_of("llama"))


def test_the_report_says_what_scale_and_padding_do():
    model = surgery.apply(make("llama"), "velora", groups=7, scale=0.1)
    lines = dict(surgery.report(model).lines)
    assert lines["scale"] == "0.1: without effect under Adam, except through eps"
    assert "groups=7 does not divide: model.layers.0.self_attn.q_proj.weight" in lines["padded"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(groups=0), surgery.OptionError, "at least 1"),
        (dict(period=0), surgery.OptionError, "at least 1"),
        (dict(scale=0.0), surgery.OptionError, "positive"),
        (dict(init="svd"), surgery.OptionError, "init"),
        (dict(groups=32), surgery.TargetError, "groups=32"),
        (dict(targets=["q_proj"], groups=32), surgery.TargetError, "32 inputs, no more than"),
        (dict(targets=["embed_tokens"]), surgery.TargetError, "belongs to Embedding"),
        (dict(targets=["q_prj"]), surgery.TargetError, "q_proj"),
    ],
)
def test_bad_options_change_nothing(options, error, message):
    model = make("llama", intermediate_size=32)
    keys = list(model.state_dict())
    with pytest.raises(error, match=message):
        surgery.apply(model, "velora", **{"groups": 4} | options)
    assert "forward" not in model.__dict__ and list(model.state_dict()) == keys


RANK = """
    import sys, torch, torch.distributed as dist
    sys.path[:0] = ["tests"]
    import surgery, passes
    from models import inputs_of, loss_of, make
    from surgery.engine.finding import surgery_of
    from ranks import assert_same, begin
    rank = begin()
    model = surgery.apply(make("plain").eval(), "velora", groups=4)
    whole = inputs_of("plain", rows=4)
    loss_of(model, {k: v.chunk(2)[rank] for k, v in whole.items()})
    mine = torch.cat([p.beside.direction.vector for p in surgery_of(model).decision.coordinates])
    assert_same(mine)
    dist.destroy_process_group()
    alone = surgery.apply(make("plain").eval(), "velora", groups=4)
    loss_of(alone, whole)
    joined = torch.cat([p.beside.direction.vector for p in surgery_of(alone).decision.coordinates])
    torch.testing.assert_close(mine, joined)
    print("equal")
"""


def test_v_is_equal_on_all_ranks_and_that_of_the_joined_batch(tmp_path):
    run_two_ranks(RANK, tmp_path)
