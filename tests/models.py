"""Tiny random models of the families that the library is tested on, and batches for them."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
import transformers
import transformers.masking_utils
from packaging.version import Version
from torch import nn
from torch.nn import functional
from transformers.integrations import peft
from transformers.utils import logging

from surgery.testing import Tiny
from surgery.testing.models import Block

logging.set_verbosity_error()

# Traced, older transformers give attention a mask and repeated keys, where in eager it is causal by
# itself: another kernel with other last bits, and more that is kept.
TRACED_WITH_A_MASK = not hasattr(transformers.masking_utils, "is_torchdynamo_exporting")

# `model.add_adapter` of transformers 5.24 wants a PEFT that registries may not have yet.
TAKES_ADAPTERS = Version(version("peft")) >= Version(getattr(peft, "MIN_PEFT_VERSION", "0"))

# One layer: a capture costs half of that of two. Tests that are about several ask for them.
VOCAB, LAYERS = 96, 1
_DECODER = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
_ENCODER = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    max_position_embeddings=128,
)
_OPT = {k: v for k, v in _ENCODER.items() if k != "intermediate_size"} | {"ffn_dim": 80}
_GPT2 = dict(vocab_size=VOCAB, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=128)
_T5 = dict(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=80, num_layers=LAYERS, num_heads=4)
_ONE_LABEL = "single_label_classification"
_VIT = dict(hidden_size=32, intermediate_size=80, num_hidden_layers=LAYERS, num_attention_heads=4)

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _DECODER | {"head_dim": 8}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _DECODER),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _DECODER | {"pad_token_id": 0}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _DECODER | {"head_dim": 8, "sliding_window": 8},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "opt": ("OPTForCausalLM", "OPTConfig", _OPT | {"word_embed_proj_dim": 32}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _DECODER | {"num_local_experts": 4}),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5 | {"decoder_start_token_id": 0}),
    "bert": ("BertForMaskedLM", "BertConfig", _ENCODER),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _ENCODER | {"pad_token_id": 1}),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        # problem_type: transformers writes it into the config at the first forward otherwise
        _VIT | dict(image_size=16, patch_size=8, num_labels=5, problem_type=_ONE_LABEL),
    ),
}

# Families that are not another one with other sizes and norms: for what is not about families.
DISTINCT = set(FAMILIES) - {"qwen2", "qwen3", "mistral", "roberta"}
DEPTH = {"gpt2": "n_layer", "t5": "num_layers"}  # what configs call it, if not num_hidden_layers


def layers(family: str, count: int) -> dict[str, int]:
    """Options of `make` for so many layers."""
    return {DEPTH.get(family, "num_hidden_layers"): count} if family in FAMILIES else {}


def build(family: str, seed: int = 0, **options: Any) -> nn.Module:
    """Make a tiny model in training mode; dropout as the family has it by default."""
    cls, config, base = FAMILIES[family]
    torch.manual_seed(seed)
    return getattr(transformers, cls)(getattr(transformers, config)(**base | options)).train()


def batch(
    family: str, rows: int = 2, length: int = 12, padding: str | None = None, seed: int = 1
) -> dict[str, torch.Tensor]:
    """Make a batch with labels; padding is None, "none" (a mask of ones), "left" or "right"."""
    generator = torch.Generator().manual_seed(seed)
    if family == "vit":
        pixels = torch.randn(rows, 3, 16, 16, generator=generator)
        return {
            "pixel_values": pixels,
            "labels": torch.randint(0, 5, (rows,), generator=generator),
        }
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    made = {"input_ids": ids, "labels": ids.clone()}
    if padding is not None:
        mask = torch.ones_like(ids)
        if padding == "left":
            mask[0, :4] = 0
        elif padding == "right":
            mask[0, -4:] = 0
        made["attention_mask"] = mask
        made["labels"][mask == 0] = -100
    return made


KINDS: dict[str, dict[str, Any]] = {  # of PEFT adapters
    "lora": {},
    "on every Linear": {"target_modules": "all-linear"},
    "dora": {"use_dora": True, "target_modules": ["up_proj"]},  # each cuts the graph in several
    "dora on every Linear": {"use_dora": True, "target_modules": "all-linear"},
    "dropout": {"lora_dropout": 0.2},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "two adapters": {},
    "trained biases": {"target_modules": ["fc1"], "bias": "all"},
    "lora on plain": {"target_modules": ["up", "down"]},
    "lora on gpt2": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
}


def adapt(model: Any, kind: str) -> Any:
    """Put adapters that change the outputs on Linears of a language model."""
    from peft import LoraConfig, get_peft_model

    # Each adapter costs a capture half a second.
    options = {"r": 4, "target_modules": ["q_proj", "up_proj", "down_proj"]}
    config = LoraConfig(**options | {"init_lora_weights": False} | KINDS[kind])
    torch.manual_seed(1)
    model = get_peft_model(model, config)
    if kind == "two adapters":
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
    return model.train()


def quantise(model: Any, kind: str) -> Any:
    """Store the weights of a language model's Linears in few bits."""
    if kind == "torchao int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model.model.layers, Int8WeightOnlyConfig())
        return model
    from bitsandbytes import nn as bits

    for owner in list(model.model.layers.modules()):
        for name, linear in list(owner.named_children()):
            if not isinstance(linear, nn.Linear):
                continue
            size, data = (linear.in_features, linear.out_features), linear.weight.data
            if kind == "nf4":
                made: Any = bits.Linear4bit(*size, bias=False, quant_type="nf4")
                made.weight = bits.Params4bit(data, quant_type="nf4", module=made)
            else:
                made = bits.Linear8bitLt(*size, bias=False, has_fp16_weights=False)
                made.weight = bits.Int8Params(data, requires_grad=False)
            setattr(owner, name, made.to("cpu"))  # which quantises
    return model


QUIET: dict[str, Any] = {  # arguments of every Trainer: rows in order, a loss for each step
    "train_sampling_strategy": "sequential",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
}


class Wide(nn.Module):
    """A Linear on an input of any shape."""

    def __init__(self, width: int = 512, out: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, out)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x).square().sum()


class SmoothBlock(Block):
    """A block with dropout, and without the kink of a relu."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(functional.gelu(self.up(self.norm(x))))
        return functional.dropout(x, 0.1, self.training)


class Smooth(Tiny):
    """`Tiny` of such blocks."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__(width, depth)
        self.blocks = nn.ModuleList(SmoothBlock(width) for _ in range(depth))


class Broken(nn.Module):
    """Blocks that Dynamo captures one by one: one graph serves them all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(SmoothBlock(16) for _ in range(3))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = block(x)
        logits = functional.linear(x, self.embed.weight)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def loss_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run a model as its user would."""
    if "tokens" in inputs:
        return model(inputs["tokens"], inputs["tokens"])
    return model(**inputs).loss


def inputs_of(family: str, **options: Any) -> dict[str, torch.Tensor]:
    if family not in FAMILIES:
        generator = torch.Generator().manual_seed(options.get("seed", 1))
        return {"tokens": torch.randint(0, 32, (options.get("rows", 2), 6), generator=generator)}
    return batch(family, **options)


def make(family: str, seed: int = 0, **options: Any) -> nn.Module:
    """`build`, and "plain", "smooth" and "graph" (a torch.fx.GraphModule) besides."""
    if family in FAMILIES:
        return build(family, seed, **options)
    torch.manual_seed(seed)
    plain = (Smooth() if family == "smooth" else Tiny()).train()
    return torch.fx.symbolic_trace(plain) if family == "graph" else plain
