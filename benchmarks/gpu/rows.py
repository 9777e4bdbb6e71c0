"""Whole steps of a Llama of 1.24 B parameters: a function for each row.

hidden 2048, 16 layers, vocabulary 128,256, tied; bfloat16, 4 x 2,048 tokens, random weights, fused
AdamW (SGD for the zeroth-order passes): the median of six steps after two, and the peak of the
whole step, weights and state included.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

import passes
import surgery

LLAMA: dict[str, Any] = dict(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128_256,
    tie_word_embeddings=True,
    max_position_embeddings=4096,
)
TINY: dict[str, Any] = LLAMA | dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=1000,
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Where and on what rows run."""

    device: str = "cuda"
    tiny: bool = False
    layers: int | None = None

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        sizes = dict(TINY if self.tiny else LLAMA)
        if self.layers is not None:
            sizes["num_hidden_layers"] = self.layers
        config = transformers.LlamaConfig(**sizes)
        with torch.device(self.device), _default(torch.bfloat16):
            model = transformers.LlamaForCausalLM(config)
        model.config.use_cache = False
        return model.train()

    def batch(self) -> dict[str, Tensor]:
        rows, length = (2, 32) if self.tiny else (4, 2048)
        generator = torch.Generator().manual_seed(1)
        size = (TINY if self.tiny else LLAMA)["vocab_size"]
        ids = torch.randint(0, int(size), (rows, length), generator=generator).to(self.device)
        return {"input_ids": ids, "labels": ids}


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# -- rows: setting -> a function that makes one step and returns its loss --------------------------

Step = Callable[[], Tensor]


def loop(model: Any, batch: dict[str, Tensor], sgd: bool = False, loss: Any = None) -> Step:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if sgd:
        optimizer = torch.optim.SGD(trained, lr=1e-6)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> Tensor:
        found = model(**batch).loss if loss is None else loss(model, batch)
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        return found.detach()

    return step


def prepared(setting: Setting, checkpointed: bool, lora: bool) -> Any:
    model: Any = setting.model()
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def ours(
    *spec: Any, checkpointed: bool = False, lora: bool = False, sgd: bool = False, **options: Any
) -> Callable[[Setting], Step]:
    def begin(setting: Setting) -> Step:
        model = prepared(setting, checkpointed, lora)
        surgery.apply(model, [make() for make in spec], **options)
        return loop(model, setting.batch(), sgd)

    return begin


def cold(begin: Callable[[Setting], Step]) -> Callable[[Setting], Step]:
    """The same row, with nothing in the caches of compilers."""

    def begin_cold(setting: Setting) -> Step:
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            os.environ[name] = tempfile.mkdtemp()
        return begin(setting)

    return begin_cold


def eager(
    checkpointed: bool = False,
    lora: bool = False,
    liger: bool = False,
    compiled: bool = False,
    budget: float | None = None,
) -> Callable[[Setting], Step]:
    def begin(setting: Setting) -> Step:
        if liger:
            from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
                apply_liger_kernel_to_llama,
            )

            apply_liger_kernel_to_llama(
                rope=True, swiglu=True, rms_norm=True, cross_entropy=False,
                fused_linear_cross_entropy=True,
            )  # fmt: skip
        model = prepared(setting, checkpointed, lora)
        if budget is not None:
            from torch._functorch import config as functorch

            functorch.activation_memory_budget = budget
        if compiled:
            model = torch.compile(model, dynamic=False)
        return loop(model, setting.batch())

    return begin


def fused_head(setting: Setting) -> Step:
    """torch's own linear_cross_entropy (2.13 and newer) in the place of head and loss."""
    fused: Any = functional.linear_cross_entropy  # pyright: ignore[reportAttributeAccessIssue]

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state[:, :-1]
        target = batch["labels"][:, 1:].flatten()
        return fused(hidden.flatten(0, 1), model.lm_head.weight, target)

    return loop(setting.model(), setting.batch(), loss=loss)


def published_mezo(setting: Setting) -> Step:
    """MeZO as published: four sweeps over the weights in place (arXiv 2305.17333, Algorithm 1)."""
    model, batch = setting.model().eval(), setting.batch()
    steps = 0

    def sweep(scale: float) -> None:
        torch.manual_seed(steps)
        for p in model.parameters():
            z = torch.normal(0.0, 1.0, size=p.shape, device=p.device, dtype=p.dtype)
            p.data.add_(z, alpha=scale)

    @torch.no_grad()
    def step() -> Tensor:
        nonlocal steps
        steps += 1
        sweep(1e-3)
        first = model(**batch).loss
        sweep(-2e-3)
        second = model(**batch).loss
        sweep(1e-3)
        sweep(-1e-6 * float(first - second) / 2e-3)
        return first

    return step


R, C = passes.Recompute, passes.ChunkedLoss


def _misa() -> Any:
    return passes.Misa(budget=0.03)


def _misa_all() -> Any:
    return passes.Misa(budget=1.0, period=1 << 20, precision="weights")


def _misa_all_copied() -> Any:
    return passes.Misa(budget=1.0, period=1 << 20)


ROWS: dict[str, Callable[[Setting], Step]] = {
    "eager AdamW": eager(),
    "recompute + chunked_loss": ours(R, C),
    "misa 3 % + recompute + chunked_loss": ours(_misa, R, C),
    "rso + recompute + chunked_loss": ours(passes.Rso, R, C),
    "velora + recompute + chunked_loss": ours(passes.Velora, R, C),
    "galore + recompute + chunked_loss": ours(passes.Galore, R, C),
    "MeZO as published": published_mezo,
    "mezo": ours(passes.Mezo, sgd=True),
    "recompute + chunked_loss + checkpointing": ours(R, C, checkpointed=True),
    "misa 3 % + chunked_loss + checkpointing": ours(_misa, C, checkpointed=True),
    "recompute + chunked_loss + compress": ours(R, C, passes.Compress),
    "misa 100 %, precision='weights'": ours(_misa_all),
    "sparse_mezo": ours(passes.SparseMezo, sgd=True),
    "lozo": ours(passes.Lozo, sgd=True),
    "subzero": ours(passes.SubZero, sgd=True),
    "Liger": eager(liger=True),
    "Liger + checkpointing": eager(liger=True, checkpointed=True),
    "checkpointing": eager(checkpointed=True),
    "linear_cross_entropy": fused_head,
    "torch.compile": eager(compiled=True),
    "recompute": ours(R),
    "chunked_loss": ours(C),
    "misa 3 %": ours(_misa),
    "misa 100 %": ours(_misa_all_copied),
    "badam": ours(passes.BAdam),
    "lisa": ours(passes.Lisa),
    "rso": ours(passes.Rso),
    "velora": ours(passes.Velora),
    "misa 3 % + recompute + chunked_loss + compress": ours(_misa, R, C, passes.Compress),
    "LoRA r=16": eager(lora=True),
    "LoRA + checkpointing": eager(lora=True, checkpointed=True),
    "LoRA + recompute + chunked_loss": ours(R, C, lora=True),
    "LoRA + velora + recompute + chunked_loss": ours(passes.Velora, R, C, lora=True),
    "recompute + chunked_loss, eager kernels": ours(R, C, compile=False),
    'recompute + chunked_loss, backend="inductor"': ours(R, C, backend="inductor"),
    "torch.compile, memory budget 0.5": eager(compiled=True, budget=0.5),
    "recompute + chunked_loss, cold": cold(ours(R, C)),
    "misa 3 % + recompute + chunked_loss, cold": cold(ours(_misa, R, C)),
}
