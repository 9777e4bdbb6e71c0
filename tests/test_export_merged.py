"""Exports with adapters added to the base: what is written gives what the live model gives."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from models import batch, make
from peft import (
    IA3Config,
    LoraConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from test_export import loaded
from torch import nn

import surgery

pytestmark = pytest.mark.filterwarnings("ignore:.*scalars that", "ignore:Model config")


@pytest.mark.parametrize("kind", ["lm_head", "embed_tokens", "both", "head saved", "dora", "ia3"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_merged_export_is_the_live_model(kind, tied, tmp_path):
    configs = {
        "lm_head": LoraConfig(target_modules=["lm_head"], init_lora_weights=False),
        "embed_tokens": LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False),
        "both": LoraConfig(target_modules=["embed_tokens", "lm_head"], init_lora_weights=False),
        "head saved": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "dora": LoraConfig(target_modules=["lm_head", "q_proj"], use_dora=True),
        "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    }
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice on tied heads
        model = get_peft_model(make("llama", tie_word_embeddings=tied), configs[kind])
        for name, parameter in model.named_parameters():
            if "magnitude" in name or "ia3" in name or "modules_to_save.default" in name:
                parameter.data *= 1.5
        surgery.apply(model, "recompute")
        surgery.export(model, tmp_path, merge=True)
        found = loaded(transformers.AutoModelForCausalLM, tmp_path)
    with torch.no_grad():
        expected, logits = model.eval()(**batch("llama")).logits, found(**batch("llama")).logits
        plain = make("llama", tie_word_embeddings=tied).eval()(**batch("llama")).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, expected, rtol=1e-3, atol=1e-4)


def test_a_merge_that_goes_wrong_is_an_error_and_leaves_the_old_export(tmp_path, monkeypatch):
    model = get_peft_model(
        make("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    surgery.apply(model, "recompute")
    surgery.export(model, tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    plain = type(model.base_model).merge_and_unload
    for damaged in ("q_proj", "norm"):

        def wrong(self, damaged=damaged):
            made = plain(self)
            for name, parameter in made.named_parameters():
                if damaged in name:
                    parameter.data *= 1.01
            return made

        with monkeypatch.context() as patch:
            patch.setattr(type(model.base_model), "merge_and_unload", wrong)
            with pytest.raises(surgery.CheckpointError, match=f"{damaged}.* differs"):
                surgery.export(model, tmp_path, merge=True)
        assert {f.name: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


class Mixed(transformers.PreTrainedModel):
    """Has convolutions, norms and a head of several layers, all of which PEFT can train."""

    config_class = transformers.LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
        self.post_init()

    def forward(self, x):
        return self.head(self.norm(self.stem(x).mean((2, 3))))


@pytest.mark.parametrize("damaged", ["stem", "norm", "head.2", "nothing"])
def test_whatever_a_merge_makes_of_any_kind_of_module_is_checked(damaged, tmp_path, monkeypatch):
    config = LoraConfig(
        target_modules=["stem"], modules_to_save=["norm", "head"], init_lora_weights=False
    )
    model = get_peft_model(Mixed(transformers.LlamaConfig()), config)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1
    surgery.apply(model, "recompute")
    plain = type(model.base_model).merge_and_unload

    def wrong(self):
        made = plain(self)
        if damaged != "nothing":
            made.get_submodule(damaged).weight.data *= 1.001
        return made

    monkeypatch.setattr(type(model.base_model), "merge_and_unload", wrong)
    if damaged == "nothing":
        surgery.export(model, tmp_path, merge=True)
        x = torch.randn(2, 3, 9, 9)
        torch.testing.assert_close(Mixed.from_pretrained(tmp_path)(x), model.eval()(x))
        return
    with pytest.raises(surgery.CheckpointError, match=f"{damaged[:4]}.* differs"):
        surgery.export(model, tmp_path, merge=True)


def test_arithmetic_of_few_bits_does_not_refuse_a_merge(tmp_path, monkeypatch):
    model = get_peft_model(
        make("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    surgery.apply(model, "recompute")
    linear, kind = nn.functional.linear, type(model.base_model)

    def short(x, weight, bias=None):  # TF32: 10 bits behind the point
        if x.dtype != torch.float32:
            return linear(x, weight, bias)
        return linear((x * 4097 - x * 4096).half().float(), weight.half().float(), bias)

    monkeypatch.setattr(nn.functional, "linear", short)
    surgery.export(model, tmp_path, merge=True)
    monkeypatch.setattr(kind, "merge_and_unload", kind.unload)
    with pytest.raises(surgery.CheckpointError, match=r"q_proj.* differs"):
        surgery.export(model, tmp_path, merge=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_lost_adapter_of_a_16_bit_model_is_an_error(dtype, tmp_path, monkeypatch):
    model = get_peft_model(
        make("llama").to(dtype), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    for name, parameter in model.named_parameters():
        parameter.data *= 0.05 if "lora_B" in name else 1.0  # a few per cent of what the base gives
    surgery.apply(model, "recompute")
    surgery.export(model, tmp_path, merge=True)
    kind = type(model.base_model)
    monkeypatch.setattr(kind, "merge_and_unload", kind.unload)
    with pytest.raises(surgery.CheckpointError, match=r"q_proj.* differs"):
        surgery.export(model, tmp_path, merge=True)


def test_a_merge_into_a_base_of_two_dtypes(tmp_path):
    base = make("llama").bfloat16()
    for kept in (base.model.norm, base.lm_head):  # as prepare_model_for_kbit_training leaves norms
        kept.float().weight.data += torch.rand_like(kept.weight)
    config = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = surgery.apply(get_peft_model(base, config), "recompute")
    head = base.lm_head
    expected = head.base_layer.weight + head.get_delta_weight("default")
    surgery.export(model, tmp_path, merge=True)
    written = load_file(tmp_path / "model.safetensors")
    assert torch.equal(written["model.norm.weight"], base.model.norm.weight)
    torch.testing.assert_close(written["lm_head.weight"], expected)
