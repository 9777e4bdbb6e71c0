"""Zeroth order: steps, whole runs, variants, resources."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from laws import method_of, own, run_two_ranks, weights
from models import VOCAB, build, inputs_of, loss_of, make
from torch import nn
from zeroth import ZEROTH, scalars, sgd, step, z_of, zeroth, zeroth_and_dtypes

import passes
import surgery
from surgery.memory import measure
from surgery.zeroth_order.method import TwoPoint

# -- 15 to 20: steps, runs, resources --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_too_small_for_the_dtype_arrive_on_average(dtype):
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).to(dtype)
    nn.init.constant_(model[0].weight, 0.02)
    surgery.apply(model, passes.Mezo())
    before, intended = model[0].weight.detach().double().clone(), torch.zeros(64, 64).double()
    optimizer = sgd(model, lr=1.0)
    for _ in range(500):
        z = z_of(model)["0.weight"].double()
        scalars(model).grad = torch.full((1,), 1e-6)
        intended -= 1e-6 * z
        optimizer.step()
    moved = model[0].weight.detach().double() - before
    slope = (moved * intended).sum() / intended.square().sum()
    noise_of = moved.std() / intended.std() / 64
    assert abs(slope - 1) < 5 * float(noise_of) + 0.05


@zeroth_and_dtypes
def test_a_journal_replays_the_run_bit_for_bit(kind, dtype):
    options = ZEROTH[kind](seed=3, directions=2)
    model = make("plain").to(dtype)
    start = copy.deepcopy(model)
    surgery.apply(model, options)
    optimizer = sgd(model, lr=1e-3)
    for seed in range(7):
        step(model, optimizer, "plain", seed)
    steps = surgery.journal(model)
    assert steps.shape == (7, 3)
    surgery.replay(surgery.apply(start, options), steps)
    assert all(torch.equal(p, own(model)[n]) for n, p in own(start).items())
    twin_optimizer = sgd(start, lr=1e-3)
    for each, opt in ((model, optimizer), (start, twin_optimizer)):
        step(each, opt, "plain", 9)
    assert all(torch.equal(p, own(model)[n]) for n, p in own(start).items())


@pytest.mark.parametrize("kind", ["mezo", "sparse", "lozo", "subzero"])
def test_a_model_may_move_to_another_dtype_in_a_round(kind):
    model = surgery.apply(make("plain"), ZEROTH[kind]())
    optimizer = sgd(model, lr=1e-3)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        step(model, optimizer, "plain", 1)
        assert scalars(model).dtype == torch.promote_types(dtype, torch.float32)
    assert method_of(model, TwoPoint).step == 4


def test_replay_refuses_what_does_not_fit():
    model = surgery.apply(make("plain"), "mezo")
    with pytest.raises(surgery.ModelError, match=r"does not fit mezo with 1 directions"):
        surgery.replay(model, torch.zeros(4, 3))
    step(model, sgd(model), "plain")
    with pytest.raises(surgery.ModelError, match="has made 1 steps already"):
        surgery.replay(model, torch.zeros(4, 2))
    with pytest.raises(surgery.ModelError, match="nothing was applied"):
        surgery.journal(make("plain"))
    with pytest.raises(surgery.ModelError, match="misa was applied"):
        surgery.journal(surgery.apply(make("plain"), "misa", budget=0.5))
    assert surgery.journal(model).numel() * 8 * 20_000 < 1 << 20


def test_weight_decay_acts_on_matrices_with_the_learning_rate():
    decayed, plain = (surgery.apply(make("plain"), "mezo", weight_decay=wd) for wd in (0.5, 0.0))
    before = weights(plain)
    for model in (decayed, plain):
        step(model, sgd(model, lr=0.1), "plain")
    for name, parameter in own(decayed).items():
        expected = own(plain)[name] - (0.05 * before[name] if parameter.ndim > 1 else 0)
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)
    start = surgery.apply(make("plain"), "mezo", weight_decay=0.5)
    surgery.replay(start, surgery.journal(decayed))
    assert all(torch.equal(p, own(decayed)[n]) for n, p in own(start).items())


def test_a_step_runs_2q_forwards_and_keeps_modes_buffers_and_masks():
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
            self.drop, self.last = nn.Dropout(0.5), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.drop(self.norm(self.first(x))))

    for estimate, count in (("central", 6), ("one_sided", 4)):
        torch.manual_seed(0)
        model = surgery.apply(Counted().train(), passes.Mezo(directions=3, estimate=estimate))
        norm = copy.deepcopy(model.norm)
        x, runs, masks = torch.randn(5, 8), [], []
        method = method_of(model, TwoPoint)
        at = method.run_at

        def noted(shift, run, at=at, runs=runs, masks=masks):
            output = at(shift, run)
            runs.append(shift)
            masks.append(torch.get_rng_state())
            return output

        method.run_at = noted
        y = model(x)
        assert len(runs) == count
        assert all(torch.equal(state, masks[0]) for state in masks)
        norm(model.first(x).detach())  # its statistics have moved once
        for name, buffer in norm.named_buffers():
            torch.testing.assert_close(model.norm.get_buffer(name), buffer, rtol=1e-2, atol=1e-2)
        assert int(model.norm.num_batches_tracked) == 1
        assert model.training and y.grad_fn is not None
        assert (
            len({id(c.parameter) for c in surgery.coordinates(model)}) == 1
            and y.grad_fn.next_functions[-1][0] is not None
        )


def test_both_signs_see_the_same_dropout_masks():
    model = nn.Sequential(nn.Linear(400, 400, bias=False), nn.Dropout(0.5)).train()
    surgery.apply(model, passes.Mezo(eps=1e-3))
    x = torch.randn(1, 400)
    torch.manual_seed(5)
    y = model(x)
    torch.manual_seed(5)
    mask = nn.functional.dropout(torch.ones(1, 400), 0.5) != 0
    assert torch.equal(y.detach() != 0, mask)  # the mid-point of two other masks is wider


def test_only_the_loss_carries_a_gradient_and_logits_are_kept_once():
    model = surgery.apply(make("llama"), "mezo")
    output = model(**inputs_of("llama"))
    assert output.loss.requires_grad and not output.logits.requires_grad
    logits = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == (2, 12, VOCAB)]
    assert len(logits) == 1
    assert type(output).__name__ == "CausalLMOutputWithPast"
    bare = model(input_ids=inputs_of("llama")["input_ids"], use_cache=False)
    assert bare.logits.requires_grad


@pytest.mark.filterwarnings("ignore")  # transformers announces its renamings
@pytest.mark.parametrize("kind", ["mezo", "lozo"])
def test_gradient_checkpointing_and_autocast_change_nothing(kind):
    def slope(checkpointing: bool, cast: bool = False) -> float:
        model = make("llama")
        if checkpointing:
            model.gradient_checkpointing_enable()
        surgery.apply(model, ZEROTH[kind](eps=1e-2))
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            loss_of(model, inputs_of("llama")).backward()
        return scalars(model).grad.item()

    assert slope(True) == slope(False)
    assert abs(slope(False, cast=True) - slope(False)) < 0.2 * abs(slope(False)) + 0.2


@pytest.mark.parametrize("kind", ["mezo", "sparse", "lozo", "subzero"])
def test_the_loss_may_be_computed_outside(kind):
    ids = inputs_of("llama")["input_ids"]
    grads = []
    for inside in (True, False):
        model = surgery.apply(make("llama").double().eval(), ZEROTH[kind](eps=1e-3))
        if inside:
            model(input_ids=ids, labels=ids).loss.backward()
        else:
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        grads.append(scalars(model).grad.item())
    assert abs(grads[0] - grads[1]) < 2e-3  # inside, transformers takes the loss in float32


@zeroth
def test_a_step_needs_the_memory_of_a_forward_and_of_one_weight(kind):
    model = build("llama", hidden_size=256, intermediate_size=1024, vocab_size=20_000)
    ids = torch.randint(0, 20_000, (2, 64))
    device = torch.device("cpu")
    with torch.no_grad():
        model(input_ids=ids, labels=ids)
        plain = measure(lambda: model(input_ids=ids, labels=ids).loss, device).peak
    surgery.apply(model, ZEROTH[kind]())
    optimizer = sgd(model)

    def train() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    train()
    largest = max(p.numel() * p.element_size() for p in own(model).values())
    found = measure(train, device)
    assert found.peak <= plain + 1.1 * largest + (16 << 20), (found.peak, plain, largest)
    assert found.live < 1 << 16


@zeroth_and_dtypes
def test_training_lowers_the_loss(kind, dtype):
    model = make("plain").to(dtype)
    rate = 2e-2 if kind in ("sparse", "random") else 1e-2
    surgery.apply(model, ZEROTH[kind](directions=4, eps=1e-2))
    optimizer = sgd(model, lr=rate)
    losses = [step(model, optimizer, "plain", seed=1) for _ in range(60)]
    assert sum(losses[-10:]) / 10 < 0.9 * losses[0]


def test_sign_steps_have_entries_of_the_learning_rate():
    model = surgery.apply(make("plain"), "mezo")
    before, optimizer = weights(model), sgd(model, lr=1e-3)
    loss_of(model, inputs_of("plain")).backward()
    scalars(model).grad.sign_()
    optimizer.step()
    for name, parameter in own(model).items():
        moved = (parameter.detach() - before[name]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("build_optimizer", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adam, {"lr": 0.01}),
    ],
)
@pytest.mark.parametrize("kind", ["mezo", "sparse", "lozo"])
def test_copies_of_16_bit_weights_get_the_dense_estimate(kind, build_optimizer, options):
    model, twin = make("plain").bfloat16(), make("plain").bfloat16()
    surgery.apply(model, ZEROTH[kind](dense=True, directions=2))
    surgery.apply(twin, ZEROTH[kind](directions=2))
    before = weights(model)
    for each in (model, twin):
        loss_of(each, inputs_of("plain")).backward()
    g = scalars(twin).grad
    assert g is not None and bool(g.any())
    found = {c.weight: c.parameter for c in surgery.coordinates(model)}
    for c in surgery.coordinates(twin):
        expected = c.expand(g).view_as(before[c.weight])
        torch.testing.assert_close(found[c.weight].grad, expected, msg=c.weight)
    build_optimizer(model.parameters(), **options).step()
    assert all(not torch.equal(p, before[n]) for n, p in own(model).items())


@pytest.mark.parametrize(
    ("build_optimizer", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.Adam, {"lr": 0.01}),
    ],
)
def test_momentum_and_adam_over_weights_are_those_of_the_dense_estimate(build_optimizer, options):
    model, twin = make("plain"), make("plain")
    surgery.apply(model, passes.Mezo(dense=True, directions=2))
    optimizer, reference = (build_optimizer(m.parameters(), **options) for m in (model, twin))
    probe = surgery.apply(make("plain"), passes.Mezo(directions=2))
    for seed in range(4):
        with torch.no_grad():
            for name, parameter in own(probe).items():
                parameter.copy_(own(model)[name])
        method_of(probe, TwoPoint).step = seed
        loss_of(probe, inputs_of("plain", seed=seed)).backward()
        g = scalars(probe).grad.clone()
        for c in surgery.coordinates(probe):
            twin.get_parameter(c.weight).grad = c.expand(g).view_as(twin.get_parameter(c.weight))
        probe.zero_grad()
        method_of(probe, TwoPoint).probed = False
        step(model, optimizer, "plain", seed)
        reference.step()
        for name, parameter in own(model).items():
            torch.testing.assert_close(parameter, own(twin)[name], rtol=1e-4, atol=1e-6)


def test_a_conservative_step_is_taken_back_whole_when_it_raises_the_loss():
    model = surgery.apply(make("plain"), "mezo")
    inputs, optimizer = inputs_of("plain"), sgd(model, lr=0.03)
    taken = refused = 0
    for _ in range(30):
        with torch.no_grad():
            before, held = loss_of(model, inputs), weights(model)
        step(model, optimizer, "plain")
        with torch.no_grad():
            if loss_of(model, inputs) > before:
                refused += 1
                for name, parameter in own(model).items():
                    parameter.copy_(held[name])
                assert torch.equal(loss_of(model, inputs), before)
            else:
                taken += 1
            assert loss_of(model, inputs) <= before
    assert taken and refused


TWO_RANKS = ["mezo", "mezo_sign", "mezo_conservative", "mezo_blocks"]
TWO_RANKS += ["sparse_mezo", "lozo", "subzero"]


@pytest.mark.parametrize("rows", [TWO_RANKS], ids=["each"])
def test_two_ranks_take_the_step_of_one_on_the_joined_batch(rows, tmp_path):
    script = """
        import sys
        sys.path[:0] = ["tests", "."]
        import torch
        from torch.nn.parallel import DistributedDataParallel
        from laws import PASSES
        from models import make, inputs_of, loss_of
        from ranks import assert_same, begin, count_sent
        import passes, surgery

        rank = begin()

        def run(options, wrap):
            model = make("plain").double()
            surgery.apply(model, options)
            outer = DistributedDataParallel(model) if wrap else model
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            sent = count_sent(outer) if wrap else []
            for seed in range(4):
                tokens = inputs_of("plain", rows=4, seed=seed)["tokens"]
                own = tokens.chunk(2)[rank] if wrap else tokens
                loss_of(outer, {"tokens": own}).backward()
                optimizer.step()
                optimizer.zero_grad()
            return {n: p.detach() for n, p in model.named_parameters()}, sent

        def compare(options):
            both, sent = run(options, True)
            upper = getattr(options, "backward", None)
            assert upper or sent == [options.directions] * 4, (options, sent)
            alone, _ = run(options, False)
            for name in alone:
                torch.testing.assert_close(both[name], alone[name], rtol=1e-7, atol=1e-9)
                assert_same(both[name], (options, name))
            return both

        for row in ROWS:
            compare(PASSES[row]())
        compare(passes.Mezo(blocks=1, update="conservative"))
        compare(passes.Lozo(backward=r"blocks\\.1.*", estimate="one_sided"))
        both = compare(passes.Mezo(directions=2))
        own, sent = run(passes.Mezo(directions=2, per_rank=True), True)
        assert sent == [4] * 4, sent
        for value in own.values():
            assert_same(value)
        assert not torch.equal(own["embed.weight"], both["embed.weight"])
        print("equal")
        """
    run_two_ranks(script.replace("ROWS", repr(rows)), tmp_path)


def test_noise_labels_keep_two_weights_apart():
    model = surgery.apply(make("plain"), "mezo")
    keys = {p.beside.key(slot) for p in method_of(model, TwoPoint).weights for slot in range(3)}
    assert len(keys) == 3 * len(method_of(model, TwoPoint).weights)
