"""Exports of models with adapters: what is written is what is live."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from laws import train
from models import TAKES_ADAPTERS, adapt, batch, make
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from test_export import loaded, same_outputs
from torch import nn

import passes
import surgery

pytestmark = pytest.mark.filterwarnings("ignore:.*scalars that", "ignore:Model config")


@pytest.mark.skipif(not TAKES_ADAPTERS, reason="this transformers wants a newer PEFT")
def test_adapters_that_transformers_has_put_in_are_written_beside_their_base(tmp_path):
    model = make("llama")
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model.add_adapter(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    surgery.apply(model, "misa", budget=0.5, targets=r".*mlp.*_proj")
    train(model, "llama", 2)
    with pytest.raises(surgery.OptionError, match="cannot merge adapters that add_adapter"):
        surgery.export(model, tmp_path, merge=True)
    surgery.export(model, tmp_path)
    base = loaded(transformers.AutoModelForCausalLM, tmp_path)
    same_outputs(model, PeftModel.from_pretrained(base, tmp_path / "adapters"), "llama")
    with pytest.warns(match="multiple adapters"):
        model.add_adapter(config, "second")
    with pytest.raises(surgery.CheckpointError, match=r"default, second .* writes only one"):
        surgery.export(model, tmp_path)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_prompts_are_written_beside_the_base(kind, tmp_path):
    config = (PromptTuningConfig if kind == "prompt" else PrefixTuningConfig)(
        task_type="CAUSAL_LM", num_virtual_tokens=4
    )
    model = get_peft_model(make("llama"), config)
    surgery.apply(model, "recompute")
    surgery.export(model, tmp_path)
    base = loaded(transformers.AutoModelForCausalLM, tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
    with torch.no_grad():
        inputs = {"input_ids": batch("llama")["input_ids"]}
        torch.testing.assert_close(again(**inputs).logits, model.eval()(**inputs).logits)
    with pytest.raises(surgery.OptionError, match="adds no weights to the base"):
        surgery.export(model, tmp_path, merge=True)


class Gated(nn.Module):
    """A base whose names look like an adapter's."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_gate, self.linear = nn.Linear(4, 4), nn.Linear(4, 4)
        self.config = SimpleNamespace(model_type="gated", to_dict=lambda: {}, get=lambda *_: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.lora_gate(x).sigmoid()).sum()


def test_names_of_the_base_are_not_taken_for_an_adapters(tmp_path):
    model = get_peft_model(Gated(), LoraConfig(target_modules=["linear"]))
    surgery.apply(model, "velora", groups=2)
    surgery.export(model, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == set(Gated().state_dict())


APART = {
    "tokens": {"init_lora_weights": False, "trainable_token_indices": [1, 2]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


@pytest.mark.parametrize("kind", APART)
def test_base_and_adapters_written_apart_are_the_live_model(kind, tmp_path):
    """Where PEFT keeps a weight under two names, or has taken a part of the base off."""
    config = LoraConfig(r=4, target_modules=["q_proj"], **APART[kind])
    model = surgery.apply(get_peft_model(make("llama"), config).train(), "recompute")
    train(model, "llama", 2)
    surgery.export(model, tmp_path)
    base = loaded(transformers.AutoModelForCausalLM, tmp_path)
    same_outputs(model, PeftModel.from_pretrained(base, tmp_path / "adapters"), "llama")


Q = {"target_modules": ["q_proj"]}
PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
SMALL = {"num_vectors": 8, "vector_length": 4, "r": 4}
KINDS = {
    "a norm saved": LoraConfig(**Q, modules_to_save=["norm"]),
    "biases": LoraConfig(**Q, bias="all"),
    "ranks": LoraConfig(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}),
    "tokens alone": peft.TrainableTokensConfig(token_indices=[1], target_modules=["embed_tokens"]),
    "adaption prompt": peft.AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1
    ),
    "prefix projection": PrefixTuningConfig(
        **PROMPT, prefix_projection=True, encoder_hidden_size=8
    ),
    "p-tuning": peft.PromptEncoderConfig(**PROMPT, encoder_hidden_size=8),
    "adalora": peft.AdaLoraConfig(**Q, total_step=9),
    "c3a": peft.C3AConfig(**Q, block_size=4),
    "fourier": peft.FourierFTConfig(**Q, n_frequency=9),
    "hra": peft.HRAConfig(**Q, r=4),
    "ln": peft.LNTuningConfig(target_modules=["norm"]),
    "loha": peft.LoHaConfig(**Q),
    "lokr": peft.LoKrConfig(**Q),
    "oft": peft.OFTConfig(**Q, oft_block_size=4),
    "vb-lora": peft.VBLoRAConfig(**Q, **SMALL),
    "vb-lora, largest": peft.VBLoRAConfig(**Q, **SMALL, save_only_topk_weights=True),
    "vera": peft.VeraConfig(**Q, r=4),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_every_kind_of_adapter_is_written_whole_beside_its_base(kind, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(make("llama"), copy.deepcopy(KINDS[kind]))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.add_(torch.randn_like(weight), alpha=0.01)
    plain = make("llama").state_dict()
    surgery.export(surgery.apply(model, "recompute"), tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(plain)
    base = loaded(transformers.AutoModelForCausalLM, tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
    ids = {"input_ids": batch("llama")["input_ids"]}
    with torch.no_grad():
        torch.testing.assert_close(again(**ids).logits, model.eval()(**ids).logits)


def test_what_peft_does_not_write_is_an_error_and_leaves_the_old_export(tmp_path, monkeypatch):
    model = surgery.apply(adapt(make("llama"), "lora"), "recompute")
    surgery.export(model, tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    named = peft.peft_model.get_peft_model_state_dict

    def forgetful(*args, **options):
        return {k: v for k, v in named(*args, **options).items() if "up_proj.lora_B" not in k}

    with monkeypatch.context() as patch:
        patch.setattr(peft.peft_model, "get_peft_model_state_dict", forgetful)
        with pytest.raises(surgery.CheckpointError, match=r"up_proj\.lora_B.* not written it"):
            surgery.export(model, tmp_path)
    inner = model.get_base_model().model.layers[0].self_attn.q_proj
    inner.kept, inner.base_layer = inner.base_layer, None  # a kind that nobody knows yet
    with pytest.raises(surgery.CheckpointError, match=r"PEFT holds .*q_proj\.kept\.weight"):
        surgery.export(model, tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


@pytest.mark.parametrize("merge", [False, True], ids=["apart", "merged"])
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_what_transformers_or_peft_cannot_write_is_an_error_of_ours(merge, tmp_path):
    options = {"lora_bias": True} if merge else {"layer_replication": [[0, 1], [0, 1]]}
    model = get_peft_model(make("llama"), LoraConfig(**Q, **options, init_lora_weights=False))
    surgery.apply(model, "recompute")
    with pytest.raises(surgery.CheckpointError, match=r"could not be exported: .*surgery\.save"):
        surgery.export(model, tmp_path / "out", merge=merge)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spec", [passes.Misa(budget=0.5), passes.Rso(rank=2)], ids=["misa", "rso"])
def test_a_base_that_is_trained_by_coordinates_is_written_with_its_adapters(spec, tmp_path):
    model = adapt(make("llama"), "lora")
    for weight in model.parameters():
        weight.requires_grad_(True)
    train(surgery.apply(model, spec), "llama", 2)
    surgery.export(model, tmp_path)
    base = loaded(transformers.AutoModelForCausalLM, tmp_path)
    same_outputs(model, PeftModel.from_pretrained(base, tmp_path / "adapters"), "llama")


def test_adapters_that_are_merged_already_are_not_added_twice(tmp_path):
    model = surgery.apply(adapt(make("llama"), "lora"), "recompute")
    model.merge_adapter()
    with pytest.raises(surgery.CheckpointError, match=r"unmerge_adapter\(\) first"):
        surgery.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match="already merged"):  # PEFT's own
        surgery.export(model, tmp_path / "out", merge=True)
    model.unmerge_adapter()
    surgery.export(model, tmp_path / "out")
