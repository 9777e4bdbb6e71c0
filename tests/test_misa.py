"""MISA, LISA and BAdam: what their papers say, written down independently."""

from __future__ import annotations

import collections
import copy
import math

import pytest
import torch
from models import LAYERS, inputs_of, layers, loss_of, make
from torch import nn

import passes
import surgery
from passes.misa import MisaScores
from surgery.engine.finding import surgery_of
from surgery.sampling.rounds import Rounds


def rounds_of(model: nn.Module) -> Rounds:
    state = surgery_of(model)
    assert state is not None
    (method,) = state.decision.methods
    assert isinstance(method, Rounds)
    return method


def step(model: nn.Module, optimizer: torch.optim.Optimizer, family: str, seed: int) -> None:
    loss_of(model, inputs_of(family, seed=seed)).backward()
    optimizer.step()
    optimizer.zero_grad()


# -- the optimizer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "foreach"),
    [("llama", False), ("llama", True), ("gpt2", True), ("phi3", True), ("mixtral", True)],
)
def test_all_modules_active_is_adamw_to_the_bit(family, foreach):
    dense = make(family).eval()  # no dropout: the two runs share one generator
    ours = surgery.apply(copy.deepcopy(dense), "misa", budget=1.0, period=7)
    matrices = {c.weight for c in surgery.coordinates(ours)}
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(name in matrices)
    runs = []
    for model in (dense, ours):
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-2, weight_decay=0.1, foreach=foreach
        )
        runs.append((model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, 100)))
    split = any(c.parameter is not ours.get_parameter(c.weight) for c in surgery.coordinates(ours))
    for seed in range(40):
        for model, optimizer, schedule in runs:
            loss_of(model, inputs_of(family, seed=seed)).backward()
            # The total norm of a split matrix is rounded in another order, so clip by value there.
            if split:
                torch.nn.utils.clip_grad_value_(model.parameters(), 1e-2)
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    for name, parameter in dense.named_parameters():
        assert torch.equal(parameter, ours.get_parameter(name)), name


def test_state_after_100_rounds_is_two_tensors_of_each_active_module():
    model = make("llama")
    surgery.apply(model, passes.Misa(budget=0.2, period=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for seed in range(201):
        step(model, optimizer, "llama", seed)
    assert rounds_of(model).round == 100
    active = {c.parameter for c in surgery.coordinates(model) if c.active}
    assert {p for p, state in optimizer.state.items() if state} == active
    for parameter, state in optimizer.state.items():
        shapes = [v.shape for k, v in state.items() if k != "step"]
        assert shapes == [parameter.shape] * 2
    # LISA as published keeps the state of all that was ever trained.
    assert len(active) < len(surgery.coordinates(model)) / 2


def test_what_enters_starts_fresh_and_what_stays_goes_on():
    model = make("plain")
    surgery.apply(model, passes.Lisa(layers=2, period=3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    counts: dict[nn.Parameter, int] = {}
    for seed in range(20):
        active = {c.parameter for c in surgery.coordinates(model) if c.active}
        step(model, optimizer, "plain", seed)
        counts = {p: counts.get(p, 0) + 1 for p in active}
        for parameter in active:
            held = optimizer.state.get(parameter)
            if held:  # freed when the round ended with this step
                assert held["step"] == counts[parameter]


@pytest.mark.parametrize("period", [1, 2, 5])
def test_rounds_have_exactly_their_length(period):
    model = make("plain")
    surgery.apply(model, passes.BAdam(period=period, order="ascending"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trained = []
    for seed in range(11):
        before = {n: p.clone() for n, p in model.named_parameters()}
        step(model, optimizer, "plain", seed)
        moved = {n.split(".")[1] for n, p in model.named_parameters() if not p.equal(before[n])}
        trained += moved
    assert trained == [str(s // period % 3) for s in range(11)]


def test_flush_adds_the_momentum_tail_once():
    base = make("plain")
    runs = {}
    for flush in (False, True):
        model = copy.deepcopy(base)
        surgery.apply(model, passes.Misa(budget=0.3, period=4, momentum_step=flush, seed=3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-6)
        active = [c.weight for c in surgery.coordinates(model) if c.active]
        for seed in range(3):
            step(model, optimizer, "plain", seed)
        # The same fourth step by hand, on copies, for the reference.
        loss_of(model, inputs_of("plain", seed=3)).backward()
        expected = {}
        for name in active:
            weight = model.get_parameter(name)
            state, grad = optimizer.state[weight], weight.grad
            mean = 0.9 * state["exp_avg"] + 0.1 * grad
            square = 0.999 * state["exp_avg_sq"] + 0.001 * grad**2
            mean, square = mean / (1 - 0.9**4), square / (1 - 0.999**4)
            ratio = mean / (square.sqrt() + 1e-6)
            tail = 0.9 / (1 - 0.9) if flush else 0.0
            expected[name] = weight * (1 - 1e-2 * 0.1) - 1e-2 * (1 + tail) * ratio
        optimizer.step()
        for name in active:
            torch.testing.assert_close(model.get_parameter(name), expected[name])
        runs[flush] = optimizer
    assert not any(runs[True].state.values())  # flushed: all states are dropped


def test_flush_refuses_an_optimizer_without_momentum():
    model = make("plain")
    surgery.apply(model, "misa", budget=0.3, momentum_step=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, inputs_of("plain")).backward()
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(surgery.OptimizerError, match="SGD has no betas"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


# -- the score -------------------------------------------------------------------------------------


def scores(names: str = "ab", **options) -> MisaScores:
    return MisaScores(options=passes.Misa(**options), names=tuple(names))


@pytest.mark.parametrize("visits", [1, 2, 7, 30])
@pytest.mark.parametrize("length", [1, 50])
def test_a_constant_gradient_gives_its_own_score(visits, length):
    held = scores()
    for _ in range(visits):
        for _ in range(length):
            held.observe({"a": 0.25})
        held.close()
    assert held.value("a") == pytest.approx(0.25, rel=1e-12)
    assert held.value("b") is None


def test_probabilities_follow_the_paper():
    held = scores("abc", score="paper", eta=2.0)
    held.observe({"a": 0.5, "b": 1.5})
    held.close()
    p = {name: math.exp(value) for name, value in held.log_p().items()}
    weights = {"a": math.exp(1.0), "b": math.exp(3.0), "c": 1.0}
    for name, weight in weights.items():
        assert p[name] == pytest.approx(weight / sum(weights.values()))


def test_relative_scores_do_not_depend_on_the_scale_of_gradients():
    found = []
    for scale in (1e-12, 1.0, 1e12):
        held = scores("abc", eta=0.7)
        held.observe({"a": 1.0 * scale, "b": 3.0 * scale})
        held.close()
        found.append(held.log_p())
    for other in found[1:]:
        assert other == pytest.approx(found[0])
    assert found[0]["b"] - found[0]["a"] == pytest.approx(0.7 * (3 - 1) / 2)
    assert found[0]["c"] == pytest.approx(  # not yet seen counts as average
        found[0]["a"] + 0.7 * 0.5
    )


def test_extreme_scores_stay_finite_and_explore_gives_a_floor():
    held = scores("abcd", score="paper", uniform_mix=0.1)
    held.observe({"a": 1e6, "b": 0.0, "c": 1e-30})
    held.close()
    p = {name: math.exp(value) for name, value in held.log_p().items()}
    assert sum(p.values()) == pytest.approx(1.0)
    assert min(p.values()) >= 0.1 / 4
    assert all(math.isfinite(v) for v in scores("ab", eta=0.0).log_p().values())


def observed(clip: float | None, scale: float, parts: int) -> dict[str, float]:
    """Train three steps and return the sums of the scores of the round."""
    model = make("plain")
    surgery.apply(model, passes.Misa(budget=0.5, period=10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
    for seed in range(3):
        tokens = inputs_of("plain", rows=4, seed=seed)["tokens"]
        for chunk in tokens.chunk(parts):
            scaler.scale(loss_of(model, {"tokens": chunk}) / parts).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    held = rounds_of(model).scores
    assert isinstance(held, MisaScores)
    return held.sums


def test_scores_are_the_mean_squared_gradient_before_clipping_and_scaling():
    model = make("plain")
    expected: collections.Counter[str] = collections.Counter()
    for seed in range(3):
        model.zero_grad()
        loss_of(model, inputs_of("plain", rows=4, seed=seed)).backward()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                expected[name] += parameter.grad.square().mean().item()
    for clip, scale, parts in [
        (None, 1.0, 1),
        (1e-3, 1.0, 1),
        (None, 1024.0, 1),
        (1e-3, 1024.0, 1),
        (1e-3, 1.0, 4),
    ]:
        for name, value in observed(clip, scale, parts).items():
            assert value == pytest.approx(expected[name], rel=1e-4), (name, clip, scale, parts)


# -- the modules -----------------------------------------------------------------------------------


def units(family: str, budget: float = 1.0, **options) -> dict[str, tuple[int, ...]]:
    model = make(family, **options)
    found = passes.Misa(budget=budget).start(model).units
    return {name: tuple(pieces[0].parameter.shape) for name, pieces in found.items()}


def test_modules_of_fused_weights_are_their_parts():
    gpt2 = units("gpt2")
    parts = {n: s for n, s in gpt2.items() if "h.0.attn.c_attn" in n}
    assert list(parts.values()) == [(32, 32)] * 3  # Conv1D: (in, out), so blocks of columns
    phi3 = units("phi3")
    block = [s for n, s in phi3.items() if "layers.0" in n]
    assert block == [(32, 32), (32, 32), (16, 32), (16, 32), (80, 32), (80, 32), (32, 80)]
    mixtral = units("mixtral")
    assert sum("layers.0.mlp.experts.gate_up_proj" in n for n in mixtral) == 4
    assert len(units("llama")) == LAYERS * 7


def test_sizes_alone_do_not_make_a_weight_fused():
    # 2 x 16 + 2 x 16 = 64 rows: what a fused query, key and value would have.
    llama = units("llama", hidden_size=32, intermediate_size=64)
    assert len(llama) == LAYERS * 7


def test_oversized_weights_are_split_into_blocks_that_fit():
    model = make("llama", vocab_size=64, intermediate_size=160)
    total = sum(p.numel() for p in model.parameters())
    method = passes.Misa(budget=0.03).start(model)
    limit = int(0.03 * total)
    by_weight = collections.Counter()
    for (piece,) in method.units.values():
        assert piece.numel <= limit
        by_weight[piece.weight] += piece.numel
    assert all(by_weight[n] == model.get_parameter(n).numel() for n in by_weight)
    assert max(collections.Counter(p.weight for (p,) in method.units.values()).values()) > 1


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "t5", "bert", "vit"])
def test_the_budget_is_hard(family, budget):
    model = make(family, **layers(family, 2))
    total = sum(p.numel() for p in model.parameters())
    method = passes.Misa(budget=budget).start(model)
    for round in range(60):
        drawn = method.draw(round)
        assert 0 < sum(method.units[n][0].numel for n in drawn) <= budget * total


def test_always_is_trained_in_every_round_and_reported():
    model = make("llama")
    surgery.apply(model, "misa", budget=0.1, period=1, always=["norm", "lm_head"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for seed in range(4):
        step(model, optimizer, "llama", seed)
        active = {c.weight for c in surgery.coordinates(model) if c.active}
        assert {"model.norm.weight", "lm_head.weight"} <= active
    text = str(surgery.report(model))
    share = 32 + 32 * 96
    assert f"{share:,} parameters" in text


def test_lisa_draws_blocks_uniformly_and_trains_the_rest_always():
    model = make("llama", num_hidden_layers=6)
    method = passes.Lisa(layers=2).start(model)
    visits = collections.Counter(n for round in range(3000) for n in method.draw(round))
    assert len(visits) == 6 and sum(visits.values()) == 6000
    assert all(abs(count - 1000) < 120 for count in visits.values())  # 4.6 standard deviations
    always = {piece.weight for piece in method.always}
    assert always == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def test_badam_visits_every_block_once_in_a_sweep():
    model = make("plain", seed=0)
    for order in ("random", "ascending", "descending"):
        method = passes.BAdam(order=order).start(model)
        sweeps = [[method.draw(3 * s + i)[0] for i in range(3)] for s in range(8)]
        assert all(sorted(sweep) == sorted(method.units) for sweep in sweeps)
        if order == "random":
            assert len({tuple(sweep) for sweep in sweeps}) > 1
        else:
            assert {tuple(s) for s in sweeps} == {
                tuple(sorted(method.units, reverse=order == "descending"))
            }


# -- memory ----------------------------------------------------------------------------------------


def test_only_the_top_block_active_saves_little():
    from surgery.memory import measure

    inputs = inputs_of("llama", rows=4, length=64)
    live = {}
    for name in ("all", "top"):
        model = make("llama", num_hidden_layers=4)
        if name == "all":
            surgery.apply(model, "misa", budget=1.0)
        else:
            surgery.apply(model, "badam", order="descending")
        loss_of(model, inputs).backward()
        live[name] = measure(lambda m=model: loss_of(m, inputs), torch.device("cpu")).live
    assert live["top"] < 0.4 * live["all"]
