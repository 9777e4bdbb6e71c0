"""Which weights: PEFT's rules, run side by side, and the blocks of a model."""

from __future__ import annotations

import builtins

import pytest
import torch
from models import FAMILIES, LAYERS, make
from torch import nn

import surgery
from surgery.weights.targets import blocks, select

RULES = [
    ["q_proj", "v_proj"],
    ["layers.0.self_attn.q_proj"],
    r".*\.(up|down)_proj",
    r"model\.layers\.[01]\.mlp\..*_proj",
    "all-linear",
]


def by_peft(model: nn.Module, targets) -> set[str]:
    """Return the modules that PEFT puts LoRA on."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    transposed = hasattr(model, "transformer")  # GPT-2's Conv1D
    config = LoraConfig(target_modules=targets, fan_in_fan_out=transposed)
    inject_adapter_in_model(config, model)
    return {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize("targets", RULES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_targets_are_what_peft_would_match(family, targets):
    if family == "gpt2" and targets != "all-linear":
        targets = {0: ["c_attn"], 1: ["h.0.mlp.c_fc"]}.get(RULES.index(targets), r".*\.c_proj")
    ours = {name.rpartition(".")[0] for name in select(make(family), targets, "targets")}
    assert ours == by_peft(make(family), targets)


@pytest.mark.parametrize("targets", RULES[:-1], ids=str)
def test_without_peft_the_rules_are_the_same(targets, monkeypatch):
    model = make("llama")
    expected = select(model, targets, "targets")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("peft"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert select(model, targets, "targets") == expected


def test_bare_parameters_are_reached_by_name():
    model = make("mixtral")
    found = select(model, ["experts.gate_up_proj"], "targets")
    assert len(found) == LAYERS and model.get_parameter(found[0]).ndim == 3


def test_every_entry_of_a_list_must_match():
    with pytest.raises(surgery.TargetError, match="targets='w_proj'"):
        select(make("llama"), ["q_proj", "w_proj"], "targets")


def test_what_names_nothing_says_so():
    with pytest.raises(surgery.TargetError, match=r"targets=\[\] names nothing"):
        select(make("plain"), [], "targets")


def test_a_tied_weight_is_said_to_be_named_by_its_other_name():
    with pytest.raises(surgery.TargetError, match=r"tied to others.*: embed\.weight"):
        select(make("plain"), ["head"], "targets")


def test_a_string_is_not_the_end_of_a_name():
    with pytest.raises(surgery.TargetError, match=r"Did you mean always=\['norm'\]\?"):
        select(make("llama"), "norm", "always")


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_found_without_model_names(family):
    model = make(family)
    found = blocks(model)
    assert len(found) == (2 * LAYERS if family == "t5" else LAYERS)
    inside = [name for names in found.values() for name in names]
    assert len(inside) == len(set(inside))
    outside = {n for n, p in model.named_parameters() if p.ndim > 1} - set(inside)
    words = ("embed", "wte", "wpe", "head", "shared", "classifier", "pooler", "cls", "transform")
    assert all(any(word in name for word in words) for name in outside), outside


def test_models_without_repeated_blocks_fall_back_to_their_modules():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert list(blocks(model)) == ["1", "3"]
    tower = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)))
    assert list(blocks(nn.ModuleDict({"tower": tower}))) == ["tower.0", "tower.1", "tower.2"]


def test_attention_of_torch_itself_counts_as_three():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    import passes

    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    found = passes.Misa(budget=1.0).start(model).units
    shapes = [tuple(u[0].parameter.shape) for n, u in found.items() if "0.self_attn.in_proj" in n]
    assert shapes == [(8, 8)] * 3


def test_a_weight_used_twice_belongs_to_its_first_block():
    shared = nn.Linear(4, 4)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(shared), nn.Sequential(shared, nn.Linear(4, 4))])
    found = blocks(model)
    assert found["layers.0"] == ["layers.0.0.weight", "layers.0.0.bias"]
    assert found["layers.1"] == ["layers.1.1.weight", "layers.1.1.bias"]


def test_frozen_weights_are_never_unfrozen():
    model = make("llama")
    frozen = [n for n, _ in model.named_parameters() if "layers.1." in n]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    surgery.apply(model, "misa", budget=1.0)
    assert not any(c.weight in frozen for c in surgery.coordinates(model))
    assert not any(model.get_parameter(name).requires_grad for name in frozen)


def test_a_coordinate_prints_in_one_line():
    model = surgery.apply(make("llama"), "misa", budget=1.0, targets=["layers.0.self_attn.q_proj"])
    (c,) = surgery.coordinates(model)
    name, shape = "model.layers.0.self_attn.q_proj.weight", tuple(c.parameter.shape)
    assert repr(c) == f"Coordinates(weight={name!r}, shape={shape}, active=True)"


def test_coordinates_follow_a_model_that_moves():
    model = make("gpt2")
    surgery.apply(model, "misa", budget=1.0)
    model.to(torch.float64)
    from models import inputs_of, loss_of

    loss_of(model, inputs_of("gpt2")).backward()
    held: dict[str, torch.Tensor] = {}
    for c in surgery.coordinates(model):
        assert c.parameter.dtype == torch.float64
        assert c.parameter.grad is not None
        held[c.weight] = held.get(c.weight, 0) + c.expand(c.parameter.detach())
    assert all(torch.equal(model.get_parameter(name), value) for name, value in held.items())
