"""What `surgery.plan` predicts beside what the allocator says: the peak of a whole training step.

python -m benchmarks.prediction [WORD ...]

Everything is counted from before the model has weights: weights, coordinates, optimizer state, and
what the second step takes on top. The prediction is made first, of a model on the meta device.
"""

from __future__ import annotations

import copy
import gc
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from transformers.utils import logging

import passes
import surgery
from benchmarks.common import adapted, run_parts, standing_and_peak
from surgery.catalogue import resolve
from surgery.engine.captures import CAPTURES
from surgery.prediction.loop import Loop, foresee, own_loss

ROWS, LENGTH, VOCAB = 2, 256, 2048
DECODER = dict(
    vocab_size=VOCAB,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
)
ENCODER = dict(
    vocab_size=VOCAB,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=8,
    problem_type="single_label_classification",
)
GPT2 = dict(vocab_size=VOCAB, n_embd=256, n_layer=4, n_head=8)
VIT = {k: v for k, v in ENCODER.items() if k != "vocab_size"} | dict(image_size=224)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", DECODER | dict(head_dim=32)),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "BERT": ("BertForSequenceClassification", "BertConfig", ENCODER),
    "ViT": ("ViTForImageClassification", "ViTConfig", VIT),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", DECODER | dict(num_local_experts=4)),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One way to train. spec: passes, None for the plain model. peft: LoRA on every Linear.
    four_bits: of weights in nf4."""

    spec: Any = None
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    clip: float | None = None
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = AdamW
    checkpointing: bool = False
    peft: bool = False
    four_bits: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)  # of the config


def _passes() -> dict[str, Any]:
    return {
        "misa": passes.Misa(budget=0.1),
        "lisa": passes.Lisa(),
        "badam": passes.BAdam(),
        "recompute": passes.Recompute(),
        "chunked_loss": passes.ChunkedLoss(),
        "velora": passes.Velora(),
        "rso": passes.Rso(rank=16),
        "galore": passes.Galore(rank=16),
        "compress": passes.Compress(),
        "mezo": passes.Mezo(),
        "sparse_mezo": passes.SparseMezo(),
        "lozo": passes.Lozo(),
        "subzero": passes.SubZero(),
    }


BF16 = torch.bfloat16
_P = _passes()
_EXACT = [_P["recompute"], _P["chunked_loss"]]
RUNS: dict[str, dict[str, Run]] = {  # the family is the last word
    "Llama": {
        "plain": Run(),
        "bfloat16": Run(dtype=BF16),
        "autocast": Run(autocast=BF16),
        "clipped": Run(clip=1.0),
        "SGD with momentum": Run(optimizer=partial(SGD, lr=1e-3, momentum=0.9)),
        "fused AdamW": Run(optimizer=partial(AdamW, fused=True)),
        "foreach AdamW": Run(optimizer=partial(AdamW, foreach=True)),
        "checkpointing": Run(checkpointing=True),
        "LoRA": Run(peft=True),
        "LoRA + recompute": Run(peft=True, spec=_P["recompute"]),
    },
    "adapters on four bits, Llama": {
        "plain": Run(four_bits=True),
        "bfloat16": Run(four_bits=True, dtype=BF16),
        "velora": Run(four_bits=True, spec=_P["velora"]),
        "recompute + chunked_loss": Run(four_bits=True, spec=_EXACT),
        "checkpointing": Run(four_bits=True, checkpointing=True),
        "mezo": Run(four_bits=True, spec=_P["mezo"], optimizer=partial(SGD, lr=1e-3)),
    },
    "each pass, Llama": {name: Run(spec=one) for name, one in _P.items()},
    "compositions, Llama": {
        "recompute + chunked_loss": Run(spec=_EXACT),
        "misa + recompute + chunked_loss": Run(spec=[_P["misa"], *_EXACT]),
        "misa + recompute + chunked_loss, bfloat16": Run(spec=[_P["misa"], *_EXACT], dtype=BF16),
        "rso + recompute + chunked_loss, autocast": Run(spec=[_P["rso"], *_EXACT], autocast=BF16),
        "velora + recompute": Run(spec=[_P["velora"], _P["recompute"]]),
        "misa + compress, clipped": Run(spec=[_P["misa"], _P["compress"]], clip=1.0),
        "misa + chunked_loss, checkpointing": Run(
            spec=[_P["misa"], _P["chunked_loss"]], checkpointing=True
        ),
    },
    "Qwen3": {
        "plain, bfloat16": Run(dtype=BF16),
        "recompute + chunked_loss, bfloat16": Run(spec=_EXACT, dtype=BF16),
        "misa, fused AdamW": Run(spec=_P["misa"], optimizer=partial(AdamW, fused=True)),
    },
    "GPT-2": {
        "plain": Run(),
        "recompute": Run(spec=_P["recompute"]),
        "rso, autocast": Run(spec=_P["rso"], autocast=BF16),
    },
    "BERT": {
        "plain": Run(),
        "checkpointing": Run(checkpointing=True),
        "recompute": Run(spec=_P["recompute"]),
        "misa": Run(spec=_P["misa"]),
    },
    "ViT": {
        "plain": Run(),
        "recompute": Run(spec=_P["recompute"]),
        "compress, bfloat16": Run(spec=_P["compress"], dtype=BF16),
    },
    "Mixtral": {
        "plain": Run(),
        "misa": Run(spec=_P["misa"]),
        "recompute + chunked_loss": Run(spec=_EXACT),
    },
}


def model_of(family: str, run: Run) -> nn.Module:
    cls, config, base = FAMILIES[family]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**copy.deepcopy(base) | dict(run.options))
    model = getattr(transformers, cls)(made).train().to(run.dtype)
    if run.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return adapted(model, 8, run.four_bits) if run.peft or run.four_bits else model


def batch_of(family: str, run: Run) -> dict[str, torch.Tensor]:
    if family == "ViT":
        pixels = torch.randn(ROWS, 3, 224, 224, dtype=run.dtype)
        return {"pixel_values": pixels, "labels": torch.zeros(ROWS, dtype=torch.long)}
    ids = torch.randint(0, VOCAB, (ROWS, LENGTH))
    labels = torch.zeros(ROWS, dtype=torch.long) if family == "BERT" else ids
    return {"input_ids": ids, "labels": labels}


def predicted(family: str, run: Run) -> dict[str, Any]:
    loop = Loop(optimizer=run.optimizer, clip=run.clip, autocast=run.autocast)
    with torch.device("meta"):
        model = model_of(family, run)
    batch = batch_of(family, run)
    began = time.perf_counter()
    step = foresee(model, batch, resolve(run.spec, {}) if run.spec is not None else (), loop)
    return {
        "start": step.start,
        "peak": step.peak,
        "phase": step.phase,
        "seconds": time.perf_counter() - began,
    }


def measured(family: str, run: Run) -> dict[str, int]:
    """Return the bytes between steps and at the peak of the second, of a real run."""
    kept: list[Any] = []

    def step() -> None:
        model, batch, optimizer = kept
        dtype = run.autocast
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
            value = own_loss(model, batch)
        value.backward()
        del value
        if run.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), run.clip)
        optimizer.step()
        optimizer.zero_grad()

    def begin() -> Callable[[], None]:
        model = model_of(family, run)
        kept.extend([model, batch_of(family, run)])
        if run.spec is not None:
            surgery.apply(model, run.spec, compile=False)
        kept.append(run.optimizer([p for p in model.parameters() if p.requires_grad]))
        step()
        gc.collect()
        return step

    start, peak = standing_and_peak(begin)
    return {"start": start, "peak": peak}


def compare(part: str, name: str) -> dict[str, Any]:
    run, family = RUNS[part][name], part.rpartition(", ")[2]
    foreseen = predicted(family, run)
    forget()
    found = measured(family, run)
    forget()
    row = {
        "predicted_megabytes": round(foreseen["peak"] / 1e6, 3),
        "measured_megabytes": round(found["peak"] / 1e6, 3),
        "off": round(foreseen["peak"] / found["peak"] - 1, 6),
        "between_steps_off": round(foreseen["start"] / found["start"] - 1, 6),
        "phase": foreseen["phase"],
        "seconds": round(foreseen["seconds"], 2),
    }
    print(part, name, row, flush=True)
    return row


def forget() -> None:
    """Free what captures keep, so that it is not freed while something else is measured."""
    CAPTURES.clear()
    torch.compiler.reset()
    gc.collect()


def main() -> None:
    logging.set_verbosity_error()
    parts = {
        part: lambda part=part, runs=runs: {name: compare(part, name) for name in runs}
        for part, runs in RUNS.items()
    }
    run_parts("prediction", parts, sys.argv[1:], tokens=[ROWS, LENGTH], threads=1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
