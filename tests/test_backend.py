"""`apply(..., backend=...)`: rewritten graphs under torch's compilers."""

from __future__ import annotations

import shutil

import pytest
import torch
from laws import adamw, own, state_of
from models import adapt, inputs_of, loss_of, make

import passes
import surgery
from surgery.memory import measure

CPU = torch.device("cpu")
FIXED = {
    "recompute": lambda: passes.Recompute(),
    "chunked_loss": lambda: passes.ChunkedLoss(),
    "both": lambda: [passes.Recompute(), passes.ChunkedLoss()],
}


def assert_same_run(family: str, spec, backend: str, **options) -> None:
    """Three steps on batches of two shapes: eager's losses and weights."""
    eager, ours = make(family, **options), make(family, **options)
    surgery.apply(ours, spec, backend=backend)
    optimizers = [adamw(model) for model in (eager, ours)]
    for seed, length in ((1, 12), (2, 12), (3, 17)):
        inputs = inputs_of(family, seed=seed, length=length)
        losses = []
        for model, optimizer in zip((eager, ours), optimizers, strict=True):
            torch.manual_seed(seed)  # the same dropout masks
            loss = loss_of(model, inputs)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert state_of(ours).step == 3
    for name, parameter in own(ours).items():
        expected = eager.get_parameter(name)
        # Adam's first steps are signs: of gradients that are nothing but rounding, too.
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-4, msg=name)
    surgery.remove(ours)
    loss_of(ours, inputs).backward()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("row", FIXED)
def test_aot_autograd_gives_eagers_run(row, family):
    assert_same_run(family, FIXED[row](), "aot_eager")


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_eagers_run():
    assert_same_run("llama", passes.Recompute(), "inductor", num_hidden_layers=1)


def test_checkpointed_regions_are_compiled_too():
    model = make("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = loss_of(make("llama"), inputs_of("llama"))
    surgery.apply(model, "recompute", backend="aot_eager")
    loss = loss_of(model, inputs_of("llama"))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_report_measures_what_was_compiled():
    model = surgery.apply(make("llama"), "recompute", backend="aot_eager")
    inputs = inputs_of("llama")
    found = surgery.report(model, inputs)
    assert found.after.activations == measure(lambda: loss_of(model, inputs), CPU).live
    assert not found.kept and dict(found.lines)["compiled by"] == "aot_eager"
    assert "takes away" not in str(found)


def test_a_function_may_be_the_backend():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = surgery.apply(make("plain"), "recompute", backend=backend)
    loss_of(model, inputs_of("plain")).backward()
    assert len(graphs) == 1 and any("region" in str(n.name) for n in graphs[0].graph.nodes)


@pytest.mark.parametrize("spec", [n for n in surgery.available() if n not in FIXED])
def test_passes_that_a_compiler_would_fix_are_refused_by_name(spec):
    model = make("llama")
    with pytest.raises(surgery.OptionError, match=rf"{spec} decides anew.*Leave backend= out"):
        surgery.apply(model, spec, backend="inductor")
    assert "forward" not in model.__dict__


def test_an_unknown_backend_is_told_before_anything_changes():
    model = make("llama")
    with pytest.raises(surgery.OptionError, match="Did you mean 'inductor'"):
        surgery.apply(model, "recompute", backend="inductr")
    assert "forward" not in model.__dict__


def test_dropout_in_a_recomputed_region_is_refused():
    model = surgery.apply(adapt(make("llama"), "dropout"), "recompute", backend="aot_eager")
    with pytest.raises(surgery.CaptureError, match="would draw another mask"):
        loss_of(model, inputs_of("llama"))


def test_torch_compile_around_surgery_is_refused():
    model = surgery.apply(make("plain"), "recompute")
    outer = torch.compile(model, backend="eager")
    tokens = inputs_of("plain")["tokens"]
    with pytest.raises(surgery.CaptureError, match=r"apply\(model, ..., backend="):
        outer(tokens, tokens)
