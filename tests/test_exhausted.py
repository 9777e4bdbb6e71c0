"""Memory that runs out: the error says what held it, and what would have saved how much."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from models import batch, build, make
from torch import nn

import surgery
from surgery.engine.finding import applied
from surgery.reports import exhausted

CPU = "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory"
ERRORS = {"torch": lambda: torch.OutOfMemoryError("no memory"), "cpu": lambda: RuntimeError(CPU)}


def raising(error: Exception):
    def hook(*_):
        raise error

    return hook


def fails_in(phase: str, model: nn.Module, optimizer, inputs, error: Exception) -> None:
    """Train a step in which the error is raised, by hooks as torch has them."""
    if phase == "forward":
        applied(model).dispatch.run = raising(error)
    if phase == "step":
        optimizer.register_step_pre_hook(raising(error))
    loss = model(**inputs).loss
    if phase == "backward":
        loss.register_hook(raising(error))
    loss.backward()
    optimizer.step()


def trained(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def note_of(error: BaseException) -> str:
    (note,) = error.__notes__
    return note


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("phase", ["forward", "backward", "step"])
def test_an_error_out_of_a_step_says_what_held_the_memory(phase, kind, monkeypatch):
    monkeypatch.setattr(exhausted, "WAYS", (("chunked_loss",),))  # a capture each
    model, error = surgery.apply(build("llama"), "misa", budget=0.5), ERRORS[kind]()
    optimizer = trained(model)
    model(**batch("llama")).loss.backward()
    optimizer.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(type(error)) as raised:
        fails_in(phase, model, optimizer, batch("llama"), error)
    assert raised.value is error
    note = note_of(error)
    assert f"Out of memory: in {phase} of a step of LlamaForCausalLM with misa whose" in note
    assert len(re.findall(r"^  [\d.,]+ MB: \d+ x ", note, re.M)) == exhausted.LARGEST
    assert "MB less, " in note and "1 rows in a batch, not 2" in note
    assert "also the pass chunked_loss" in note
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_numbers_are_those_of_a_plan(monkeypatch):
    monkeypatch.setattr(exhausted, "WAYS", (("badam",),))
    monkeypatch.setattr(exhausted, "megabytes", lambda count: f"{count} bytes")
    model, error = surgery.apply(build("llama"), "chunked_loss"), torch.OutOfMemoryError("no")
    with pytest.raises(torch.OutOfMemoryError):
        fails_in("backward", model, trained(model), batch("llama"), error)
    now = surgery.plan(build("llama"), batch("llama"), "chunked_loss").after
    then = surgery.plan(build("llama"), batch("llama"), ["chunked_loss", "badam"]).after
    assert f"peak, {now.peak} bytes, is in {now.phase}" in note_of(error)
    saved = f"  {now.peak - then.peak} bytes less, {then.peak} bytes: also the pass badam"
    assert saved in note_of(error)


def test_other_errors_get_no_note():
    model, error = surgery.apply(build("llama"), "misa", budget=0.5), RuntimeError("of shapes")
    with pytest.raises(RuntimeError):
        fails_in("backward", model, trained(model), batch("llama"), error)
    assert not hasattr(error, "__notes__")


def test_a_step_that_cannot_be_played_says_so(monkeypatch):
    def broken(*_):
        raise ValueError("of the model's own")

    monkeypatch.setattr(exhausted, "foresee", broken)
    model, error = surgery.apply(build("llama"), "misa", budget=0.5), torch.OutOfMemoryError("no")
    with pytest.raises(torch.OutOfMemoryError):
        fails_in("backward", model, trained(model), batch("llama"), error)
    assert "what held it cannot be told" in note_of(error)
    assert "of the model's own" in note_of(error)


def test_models_without_surgery_are_explained_inside(monkeypatch):
    monkeypatch.setattr(exhausted, "WAYS", (("badam",),))
    model, error = build("llama"), torch.OutOfMemoryError("no memory")
    with pytest.raises(torch.OutOfMemoryError), surgery.explain_oom(model):
        fails_in("backward", model, trained(model), batch("llama"), error)
    assert "in backward of a step of LlamaForCausalLM whose" in note_of(error)
    assert "less, " in note_of(error) and ": the pass badam" in note_of(error)
    assert not model._forward_pre_hooks


def test_outside_of_training_nothing_is_remembered():
    model = surgery.apply(make("plain"), "recompute")
    tokens = torch.zeros(2, 6, dtype=torch.long)
    with torch.no_grad(), surgery.explain_oom(make("plain")):
        model(tokens, tokens)
    assert copy.deepcopy(model) is not model


def test_what_is_no_model_is_told():
    with (
        pytest.raises(surgery.ModelError, match=r"takes an nn\.Module, not a str"),
        surgery.explain_oom("x"),
    ):
        pass
