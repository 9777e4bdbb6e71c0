"""What report and plan say in bytes, against the allocator and plain arithmetic."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from types import FrameType

import pytest
import torch
from laws import PASSES, state_of
from models import build, inputs_of, loss_of, make

import passes
import surgery
from surgery import memory
from surgery.memory import measure, measure_training, storage_bytes

CPU = torch.device("cpu")


def test_measure_counts_what_is_held_and_the_peak():
    def work() -> torch.Tensor:
        kept = torch.empty(1000, dtype=torch.float32)
        torch.empty(5000, dtype=torch.float32).fill_(1)
        return kept

    found = measure(work, CPU)
    assert found.live == 4000
    assert found.peak == 24000
    assert found.result.shape == (1000,)


def test_only_what_the_call_took_is_given_back_by_it():
    """torch's profiler knows blocks by address, and forgets none that are given back after it."""
    for _ in range(50):
        measure(lambda: [torch.empty(2000 + n) for n in range(20)], CPU)
        others = [torch.empty(2000 + n) for n in range(20)]  # at some of the same addresses

        def gives_back(others: list[torch.Tensor] = others) -> torch.Tensor:
            others.clear()
            return torch.empty(10)

        assert measure(gives_back, CPU).live == 40


def test_report_measures_before_and_now():
    model = make("llama", num_hidden_layers=3)
    inputs = inputs_of("llama", rows=4, length=32)
    loss_of(model, inputs)
    eager = measure(lambda: loss_of(model, inputs), CPU).live
    surgery.apply(model, "badam", order="descending")
    state = torch.get_rng_state()
    found = surgery.report(model, inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.measured and found.before.activations == eager
    now = measure(lambda: loss_of(model, inputs), CPU).live
    assert found.after.activations == now
    assert now < 0.5 * eager
    active = sum(c.parameter.numel() for c in surgery.coordinates(model) if c.active)
    assert found.after.gradients == 4 * active
    assert found.after.optimizer == 8 * active
    total = sum(p.numel() for p in model.parameters())
    assert found.before.gradients == found.before.parameters == 4 * total
    assert "never trained" in str(found)


def test_report_after_training_measures_the_optimizer():
    model = make("gpt2")
    surgery.apply(model, "misa", budget=0.2, period=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert measure_training(model, inputs_of("gpt2"), optimizer).activations
    found = surgery.report(model)
    active = [c.parameter for c in surgery.coordinates(model) if c.active]
    # AdamW keeps two tensors and a step counter of four bytes for each.
    assert found.after.optimizer == sum(8 * p.numel() + 4 for p in active)
    assert found.after.parameters == storage_bytes(model.parameters())
    assert found.after.parameters < 1.4 * found.before.parameters  # copies, and where others rest


def test_measure_training_adds_up():
    model = make("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = measure_training(model, inputs_of("llama"), optimizer)
    count = sum(p.numel() for p in model.parameters())
    assert found.parameters == found.gradients == 4 * count
    assert found.optimizer == 8 * count + 4 * len(before)
    assert found.total == sum(v for v in vars(found).values() if v is not None)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "misa"), ("gpt2", "misa"), ("llama", "lisa"), ("gpt2", "badam"), ("bert", "badam")],
)
def test_plan_predicts_what_report_measures(family, name):
    options = {"misa": {"budget": 0.2}, "lisa": {"layers": 1}}.get(name, {})
    inputs = inputs_of(family, rows=4, length=32)
    with torch.device("meta"):
        skeleton = build(family)
    planned = surgery.plan(skeleton, inputs, name, **options)
    model = surgery.apply(make(family), name, **options)
    found = surgery.report(model, inputs)
    for kind in ("parameters", "gradients", "optimizer"):
        assert getattr(planned.before, kind) == getattr(found.before, kind)
        assert getattr(planned.after, kind) == getattr(found.after, kind)
    for one, other in ((planned.before, found.before), (planned.after, found.after)):
        assert one.activations == pytest.approx(other.activations, rel=1e-4), planned  # constants


def test_plan_changes_nothing_and_needs_no_batch():
    model = make("llama")
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    found = surgery.plan(model, None, "misa", budget=0.2)
    assert found.after.activations is None
    assert found.after.gradients <= 0.2 * found.before.parameters
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert "forward" not in model.__dict__
    with pytest.raises(surgery.OptionError, match="Did you mean"):
        surgery.plan(model, None, "mida")
    with pytest.raises(surgery.ModelError, match="no parameters"):
        surgery.plan(torch.nn.ReLU(), None, "misa")


def test_tables_print():
    one = memory.Bytes(parameters=10, gradients=20, optimizer=30, activations=40)
    table = memory.table({"a": one, "b": one}, "memory")
    assert table.row_count == 5 and len(table.columns) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_round_on_the_gpu_trains_within_its_budget():
    model = make("llama", num_hidden_layers=6).cuda()
    surgery.apply(model, "misa", budget=0.1, period=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs = {k: v.cuda() for k, v in inputs_of("llama").items()}
    for _ in range(6):
        loss_of(model, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = measure_training(model, inputs, optimizer)
    assert found.gradients <= 0.1 * found.parameters
    assert measure(lambda: torch.empty(1024, device="cuda"), torch.device("cuda")).live == 4096


@pytest.mark.parametrize(
    ("family", "row"),
    [("llama", "badam"), ("llama", "recompute"), ("llama", "misa_and_both")]
    + [("gpt2", "recompute"), ("gpt2", "chunked_loss")],
)
def test_report_names_what_is_kept_to_the_byte(family, row):
    still = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    model = make(family, **(still if family == "gpt2" else {"num_hidden_layers": 3}))
    surgery.apply(model, PASSES[row]())
    found = surgery.report(model, inputs_of(family, rows=4, length=32))
    assert abs(sum(k.bytes for k in found.kept) - found.after.activations) < 0.005 * (
        found.after.activations
    )
    widest = found.kept[0]
    assert ".*" in widest.where and widest.count >= 1
    text = str(found)
    assert f"{widest.count} x {widest.made_by} in {widest.where}" in text.replace("\n", " ")


def report_that_adds_up(model, inputs):
    """Return the report, which must agree with the allocator, measured and by operation."""
    gc.collect()  # what earlier tests left would count as given back
    live = measure(lambda: loss_of(model, inputs), CPU).live
    found = surgery.report(model, inputs)
    assert found.after.activations == live
    assert abs(sum(kept.bytes for kept in found.kept) - live) <= 0.005 * live
    return found


@pytest.mark.parametrize("row", ["misa", "recompute", "velora", "rso_and_all"])
def test_the_account_adds_up_inside_checkpointing(row):
    model = make("llama", num_hidden_layers=2)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    surgery.apply(model, PASSES[row]())
    inputs = inputs_of("llama", rows=4, length=32)
    loss_of(model, inputs).backward()
    report_that_adds_up(model, inputs)


def test_the_account_adds_up_for_adapters_inside_checkpointing():
    from peft import LoraConfig, get_peft_model

    model = make("llama", num_hidden_layers=2)
    model.gradient_checkpointing_enable({"use_reentrant": False})  # PEFT hooks the embeddings again
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    surgery.apply(model, passes.Velora(groups=8))
    inputs = inputs_of("llama", rows=4, length=32)
    loss_of(model, inputs).backward()
    assert state_of(model).dispatch.captures == 1
    found = report_that_adds_up(model, inputs)
    assert any(kept.where == "base_model.model.model.embed_tokens" for kept in found.kept)
    embeddings = model.get_input_embeddings()
    assert not embeddings._forward_hooks
    surgery.remove(model)
    assert len(embeddings._forward_hooks) == 2


@pytest.mark.parametrize("row", ["misa", "rso", "mezo", "recompute", "chunked_loss", "compress"])
@pytest.mark.filterwarnings("ignore:.*scalars that")
def test_a_step_leaves_no_circle_with_tensors_in_it(row):
    """A batch, an output or a block's weights would lie there until Python looks for garbage."""
    model = surgery.apply(make("llama"), PASSES[row]())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step() -> None:
        inputs = inputs_of("llama")
        model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    gc.collect()
    gc.disable()
    flags = gc.get_debug()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        step()
        gc.collect()
        left = [each for each in gc.garbage if isinstance(each, torch.Tensor | FrameType)]
    finally:
        gc.set_debug(flags)
        gc.garbage.clear()
        gc.enable()
    assert not left


def test_measuring_prints_nothing():
    code = "import torch as t, surgery.memory as m; m.measure(lambda: t.ones(3), t.device('cpu'))"
    env = {k: v for k, v in os.environ.items() if k != "KINETO_LOG_LEVEL"}
    made = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (made.returncode, made.stdout, made.stderr) == (0, "", "")
