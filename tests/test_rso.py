"""rso: the dense reference, LoRA with a frozen A, the projections' distribution, bytes."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from laws import Moved, method_of, optimizer_of, train
from models import LAYERS, inputs_of, loss_of, make
from torch import nn

import passes
import surgery
from passes.rso import Subspaces, transport
from surgery.memory import measure
from surgery.weights.targets import blocks


def frames(model: nn.Module) -> dict[str, torch.Tensor]:
    return {p.weight: p.beside.frame.matrix for p in method_of(model, Subspaces).projected}


@pytest.mark.parametrize("projection", ["gaussian", "orthonormal"])
@pytest.mark.parametrize("state", ["reset", "transport"])
def test_weights_are_the_sum_of_all_rounds(projection, state):
    model = make("llama").double()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    surgery.apply(model, "rso", rank=6, period=3, projection=projection, on_resample=state)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    total = {c.weight: torch.zeros_like(start[c.weight]) for c in surgery.coordinates(model)}
    seen = []

    def add(*_):
        for c in surgery.coordinates(model):
            last = (
                method_of(model, Subspaces).steps == 2
            )  # the round's last step: B is what it came to
            if last:
                total[c.weight] += c.parameter.detach() @ frames(model)[c.weight].double()

    optimizer.register_step_post_hook(add)
    for seed in range(9):
        loss_of(model, inputs_of("llama", seed=seed)).backward()
        seen.append(frames(model))
        optimizer.step()
        optimizer.zero_grad()
    for name, change in total.items():
        weight = model.get_parameter(name).detach()
        assert change.norm() > 0.05
        assert (weight - start[name] - change).abs().max() < 1e-12, name
        assert torch.equal(seen[0][name], seen[2][name])
        assert not torch.equal(seen[2][name], seen[3][name])


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_round_is_lora_with_a_frozen(kind):
    from peft import LoraConfig, get_peft_model

    ours = make("llama").double()
    theirs = copy.deepcopy(ours)
    surgery.apply(ours, "rso", rank=4, period=1000)
    loss_of(ours, inputs_of("llama"))
    config = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear")
    theirs = get_peft_model(theirs, config, autocast_adapter_dtype=False)
    by_name = {c.weight: c.parameter for c in surgery.coordinates(ours)}
    pairs = {}
    for name, parameter in theirs.named_parameters():
        weight = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
        if "lora_A" in name:
            parameter.data.copy_(frames(ours)[weight])
            parameter.requires_grad_(False)
        elif "lora_B" in name:
            weight = weight.replace(".lora_B.default", "")
            pairs[weight] = parameter
    assert pairs.keys() == by_name.keys()
    optimizers = tuple(
        optimizer_of(kind, parameters, lr=1.0) for parameters in (by_name.values(), pairs.values())
    )
    for seed in range(12):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            loss_of(model, inputs_of("llama", seed=seed)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, b in pairs.items():
        assert (by_name[name] - b).abs().max() < 1e-11, name
        assert b.abs().max() > 1e-3


@pytest.mark.parametrize("projection", ["gaussian", "orthonormal"])
def test_projections_have_the_identity_as_their_mean(projection):
    model = make("llama")
    surgery.apply(model, passes.Rso(rank=8, projection=projection, targets=["q_proj"]))
    frame = method_of(model, Subspaces).projected[0].beside.frame
    mean, draws = torch.zeros(32, 32, dtype=torch.float64), 3000
    for round in range(draws):
        method_of(model, Subspaces).round = round
        p = frame.draw().double()
        if projection == "orthonormal":
            assert torch.allclose(p @ p.t(), torch.eye(8).double() * 32 / 8, atol=1e-5)
        mean += p.t() @ p / draws
    # entries of P^T P have a variance of at most 2/r; largest of a thousand: 4.5 deviations
    assert (mean - torch.eye(32)).abs().max() < 4.5 * math.sqrt(2 / 8 / draws)


@pytest.mark.parametrize(("share", "distinct"), [(True, 4 * 2), (False, 7 * 2), ("width", 2)])
def test_who_shares_a_projection(share, distinct):
    model = surgery.apply(make("llama", num_hidden_layers=2), "rso", rank=4, share=share)
    inputs = inputs_of("llama", rows=2, length=12)
    loss_of(model, inputs).backward()
    assert len({id(p.beside.frame) for p in method_of(model, Subspaces).projected}) == distinct
    z = [kept for kept in surgery.report(model, inputs).kept if kept.made_by == "project"]
    readers = (7 if share is False else 4) * 2  # one z for each x, whatever P is
    assert sum(kept.count for kept in z) == readers
    assert sum(kept.bytes for kept in z) == readers * 24 * 4 * 4


def test_draws_depend_on_seed_name_and_round_only():
    def drawn(seed: int, disturb: bool) -> dict[str, torch.Tensor]:
        model = make("llama")
        if disturb:
            torch.rand(7)
        surgery.apply(model, "rso", rank=4, seed=seed)
        state = torch.get_rng_state()
        loss_of(model, inputs_of("llama", seed=9 if disturb else 1))
        assert torch.equal(torch.get_rng_state(), state)
        return frames(model)

    first, again, other = drawn(0, False), drawn(0, True), drawn(1, False)
    for name, p in first.items():
        assert torch.equal(p, again[name]) and not torch.equal(p, other[name])


def test_bytes_of_gradient_optimizer_and_activations():
    plain = make("llama")
    model = surgery.apply(copy.deepcopy(plain), "rso", rank=4)
    inputs = inputs_of("llama", rows=4, length=32)
    loss_of(model, inputs).backward()
    found = surgery.report(model, inputs)
    numbers = sum(c.parameter.numel() for c in surgery.coordinates(model))
    assert numbers == LAYERS * 4 * (32 + 16 + 16 + 32 + 80 + 80 + 32)
    assert (found.after.gradients, found.after.optimizer) == (4 * numbers, 8 * numbers)
    live = measure(lambda: loss_of(model, inputs), torch.device("cpu")).live
    assert found.after.activations == live


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_saved_bytes_are_those_of_the_formulas(family):
    """notes/rso.md 1.4: a GPT block keeps 7 n fewer and 4 r more numbers a token."""
    rank, rows, length = 4, 4, 16
    if family == "gpt2":
        off = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
        plain = make("gpt2", attn_implementation="eager", **off)
        freed = (
            7 * plain.config.n_embd
        )  # what c_attn, c_proj, c_fc read, and 4 n of the second c_proj
        depth = plain.config.n_layer
    else:
        plain = make("llama")
        # What attention gives to o_proj is kept by attention as well.
        freed = 2 * plain.config.hidden_size + plain.config.intermediate_size
        depth = plain.config.num_hidden_layers
    targets = {name for own in blocks(plain).values() for name in own}
    targets = {n for n in targets if plain.get_parameter(n).ndim == 2}
    others = [n for n, _ in plain.named_parameters() if n not in targets]
    model = surgery.apply(copy.deepcopy(plain), passes.Rso(rank=rank, always=others))
    inputs = inputs_of(family, rows=rows, length=length)
    live = []
    for each in (plain, model):
        loss_of(each, inputs).backward()
        live.append(measure(lambda m=each: loss_of(m, inputs), torch.device("cpu")).live)
    assert live[0] - live[1] == depth * rows * length * (freed - 4 * rank) * 4


def test_traffic_of_llama_7b():
    """Only the gradients of B travel: 0.215 of those of the Linears at r = 1024."""
    import transformers

    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    found = passes.Rso(rank=1024).start(model).projected
    dense = sum(model.get_parameter(piece.weight).numel() for piece in found)
    assert len(found) == 7 * 32
    assert round(sum(piece.numel for piece in found) / dense, 3) == 0.215


def test_transport_follows_the_formula():
    generator = torch.Generator().manual_seed(0)
    old, new = (torch.randn(4, 16, generator=generator) / 2 for _ in range(2))
    m, v = torch.randn(5, 4, generator=generator), torch.rand(5, 4, generator=generator)
    state = {"step": torch.tensor(3.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    transport(state, old, new)
    torch.testing.assert_close(state["exp_avg"], m @ old @ new.t() * 4 / 16)
    torch.testing.assert_close(state["exp_avg_sq"], v.mean(1)[:, None].expand(5, 4))
    assert state["step"] == 3


def test_state_at_the_end_of_a_round():
    seen: list[tuple] = []

    def note(state, old, new):
        seen.append((sorted(state), old.shape, new.shape, torch.equal(old, new)))

    for state, kept in (("reset", False), ("transport", True), (note, True)):
        model = surgery.apply(make("llama"), passes.Rso(rank=4, period=2, on_resample=state))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for seed in range(2):
            loss_of(model, inputs_of("llama", seed=seed)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert bool(any(optimizer.state.values())) == kept
        assert all(not c.parameter.any() for c in surgery.coordinates(model))
    assert len(seen) == 7 * LAYERS
    assert all(not same and old == new for _, old, new, same in seen)


def test_prox_and_weight_decay_are_decoupled():
    lr, prox, decay = 0.1, 0.5, 0.2
    model = make("llama").double()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    surgery.apply(model, "rso", rank=4, prox=prox, weight_decay=decay)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    b = {c.weight: torch.zeros_like(c.parameter) for c in surgery.coordinates(model)}
    w = {name: start[name].clone() for name in b}
    for seed in range(3):
        loss_of(model, inputs_of("llama", seed=seed)).backward()
        for c in surgery.coordinates(model):
            stepped = (b[c.weight] - lr * c.parameter.grad) * (1 - lr * prox)
            change = (stepped - b[c.weight]) @ frames(model)[c.weight].double()
            w[c.weight] = w[c.weight] * (1 - lr * decay) + change
            b[c.weight] = stepped
        optimizer.step()
        optimizer.zero_grad()
    for c in surgery.coordinates(model):
        torch.testing.assert_close(c.parameter.detach(), b[c.weight], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(
            model.get_parameter(c.weight).detach(), w[c.weight], rtol=1e-12, atol=1e-14
        )


class Quadratic(nn.Module):
    """f(W) = L / 2 ||W - A||^2 through a Linear on the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, 6, bias=False)])
        generator = torch.Generator().manual_seed(0)
        self.aim = torch.randn(width, 6, generator=generator, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layers[0](x) - self.aim).square().sum() / 2


def test_on_a_quadratic_the_gradient_shrinks_at_the_rate_of_rank_over_width():
    width = 32
    eye = torch.eye(width).double()
    for rank in (2, 4, 8):
        model = Quadratic(width).double()
        nn.init.zeros_(model.layers[0].weight)
        surgery.apply(model, "rso", rank=rank, period=1, projection="orthonormal")
        # One exact step in the subspace: the Hessian of B is in/r times the identity.
        optimizer = torch.optim.SGD(model.parameters(), lr=rank / width)
        losses = []
        for _ in range(60):
            loss = model(eye)
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        # E[f] shrinks by 1 - r/in a round
        rate = (losses[-1] / losses[0]) ** (1 / 59)
        assert abs(rate - (1 - rank / width)) < 0.2 * rank / width, rank
        assert all(b <= a for a, b in itertools.pairwise(losses))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(rank=0), surgery.OptionError, "at least 1"),
        (dict(period=0), surgery.OptionError, "at least 1"),
        (dict(prox=-1.0), surgery.OptionError, "prox"),
        (dict(weight_decay=math.nan), surgery.OptionError, "weight_decay"),
        (dict(on_resample="rotate"), surgery.OptionError, "transport"),
        (dict(share="block"), surgery.OptionError, "share"),
        (dict(projection="haar"), surgery.OptionError, "projection"),
        (dict(rank=80), surgery.TargetError, "rank=80"),
        (dict(rank=32, targets=["q_proj"]), surgery.TargetError, "rank=32.*always"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        surgery.apply(make("llama"), "rso", **{"rank": 4} | options)


def test_velora_and_rso_on_one_weight_are_refused():
    both = [passes.Velora(groups=4), passes.Rso(rank=4)]
    with pytest.raises(surgery.ConflictError, match=r"velora and rso both train model\.layers\.0"):
        surgery.apply(make("llama"), both)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_steps_of_a_round_are_rounded_once_into_16_bits(dtype):
    model = surgery.apply(make("plain").to(dtype), passes.Rso(rank=4, period=10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    moved = Moved(model, optimizer)
    start = {name: weight.double() for name, weight in moved.weights.items()}
    moved.weights = {name: weight.clone() for name, weight in start.items()}
    optimizer.register_step_post_hook(moved.move)
    train(model, "plain", 30, optimizer)
    info = torch.finfo(dtype)
    for c in surgery.coordinates(model):
        weight = model.get_parameter(c.weight).detach().double()
        size = torch.maximum(weight.abs(), start[c.weight].abs())
        ulp = 2.0 ** size.clamp(min=info.tiny).log2().floor() * info.eps
        error = (weight - moved.weights[c.weight]) / ulp
        # Three rounds: at most 0.41 sqrt(3). Each step by itself would be 0.41 sqrt(30) = 2.2.
        assert error.square().clamp(max=100).mean().sqrt() < 1.2, c.weight
