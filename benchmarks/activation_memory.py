"""Bytes alive after forward, peak bytes and time of forward and backward, on SmolLM2 (8 blocks).

    python -m benchmarks.activation_memory

Every row trains the same batch from the same weights in one run; times are ratios to eager,
alternating, the median over rounds. Memory is the allocator's, the weights left out; the output
object (loss, logits if there are any, keys and values) is alive when `live` is read.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
from peft import LoraConfig, get_peft_model
from transformers.utils import logging

import passes
import surgery
from benchmarks.common import alternate, ratio, save
from examples.real import kjv, smollm2, token_rows
from surgery import memory

BATCH, LENGTH = 2, 256
Build = Callable[[Any], Any]


def checkpointed(build: Build) -> Build:
    def made(model: Any) -> Any:
        model = build(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    return made


def budget(share: float) -> Build:
    """PyTorch's own: torch.compile recomputes until this share of what it would save is left."""

    def made(model: Any) -> Any:
        compiled = torch.compile(model, backend="aot_eager_decomp_partition")

        def run(**batch: Any) -> Any:
            with torch._functorch.config.patch(activation_memory_budget=share):
                return compiled(**batch)

        return run

    return made


def lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))


def ours(*chosen: Any) -> Build:
    return lambda model: surgery.apply(model, list(chosen))


EXACT = (passes.Recompute(), passes.ChunkedLoss())
MISA = passes.Misa(budget=0.03, period=1 << 30)
ROWS: dict[str, Build] = {
    "eager": lambda model: model,
    "checkpointing": checkpointed(lambda model: model),
    "activation_memory_budget 0.5 (aot_eager)": budget(0.5),
    "LoRA r=16 (peft)": lora,
    "recompute": ours(passes.Recompute()),
    "chunked_loss": ours(passes.ChunkedLoss()),
    "recompute + chunked_loss": ours(*EXACT),
    "recompute + chunked_loss, checkpointing": checkpointed(ours(*EXACT)),
    "misa 3 %": ours(MISA),
    "misa 3 % + recompute + chunked_loss": ours(MISA, *EXACT),
}


def main() -> None:
    logging.set_verbosity_error()
    start, tokenizer = smollm2(layers=8)
    start.train()
    ids = token_rows(kjv(), tokenizer, LENGTH, BATCH)
    batch = {"input_ids": ids, "labels": ids}
    torch._dynamo.config.cache_size_limit = 64
    bases = {name: copy.deepcopy(start) for name in ROWS}
    models = {name: build(bases[name]) for name, build in ROWS.items()}
    losses = {}

    def stepper(name: str, model: Any) -> Callable[[], None]:
        def step() -> None:
            bases[name].zero_grad()  # gradients count: they are made anew in every step
            loss = model(**batch).loss
            loss.backward()
            losses[name] = loss.item()

        return step

    steps = {name: stepper(name, model) for name, model in models.items()}
    seconds = alternate(steps, times=7, warm_up=1)
    rows: dict[str, Any] = {}
    for name, model in models.items():
        forward = memory.measure(lambda model=model: model(**batch), torch.device("cpu"))
        forward.result.loss.backward()
        whole = memory.measure(steps[name], torch.device("cpu"))
        rows[name] = {
            "live_megabytes": round(forward.live / 1e6, 1),
            "peak_megabytes": round(whole.peak / 1e6, 1),
            "time_over_eager": round(ratio(seconds, name, "eager"), 3),
            "milliseconds": round(1e3 * statistics.median(seconds[name]), 1),
            "loss": losses[name],
        }
        print(name, rows[name], flush=True)
    for row in rows.values():
        row["live_over_eager"] = round(row["live_megabytes"] / rows["eager"]["live_megabytes"], 3)
        row["peak_over_eager"] = round(row["peak_megabytes"] / rows["eager"]["peak_megabytes"], 3)
    save("activation_memory", {"batch": [BATCH, LENGTH], "dtype": "float32", "rows": rows})


if __name__ == "__main__":
    main()
