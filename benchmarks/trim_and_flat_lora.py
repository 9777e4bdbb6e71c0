"""What trim saves of a vocabulary, and what the noise of flat_lora costs.

    python -m benchmarks.trim_and_flat_lora

Four blocks of SmolLM2, 2 x 512 tokens of the King James Bible, float32, AdamW, one thread. `peak`
is what a step adds to weights and optimizer state; times are alternating, ratios their medians.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import logging

import passes
import surgery
from benchmarks.common import adapted, alternate, ratio, run_parts, step_of
from examples.real import kjv, smollm2, token_rows
from surgery import memory

LAYERS, BATCH, LENGTH, RANK = 4, 2, 512, 16


def rows_of(
    models: dict[str, Callable[[], Any]], batches: list[torch.Tensor], base: str
) -> dict[str, Any]:
    built = {name: make().train() for name, make in models.items()}
    optimizers = {name: torch.optim.AdamW(m.parameters(), lr=1e-5) for name, m in built.items()}
    steps = {name: step_of(m, optimizers[name], batches) for name, m in built.items()}
    seconds = alternate(steps, times=9, warm_up=2)
    return {
        name: {
            "weights_megabytes": round(memory.storage_bytes(model.parameters()) / 1e6, 1),
            "optimizer_megabytes": round(memory.state_bytes(optimizers[name]) / 1e6, 1),
            "peak_megabytes": round(
                memory.measure(steps[name], memory.device_of(model)).peak / 1e6, 1
            ),
            "milliseconds": round(1e3 * statistics.median(seconds[name]), 1),
            "time_ratio": round(ratio(seconds, name, base), 3),
        }
        for name, model in built.items()
    }


def trim() -> dict[str, Any]:
    start, tokenizer = smollm2(layers=LAYERS)
    used = sorted(set(tokenizer(kjv()).input_ids))
    batches = list(token_rows(kjv(), tokenizer, LENGTH, 8 * BATCH).split(BATCH))

    def by(*given: Any) -> Callable[[], Any]:
        return lambda: surgery.apply(copy.deepcopy(start), list(given))

    whole = passes.Trim(used=used)
    models = {
        "AdamW": lambda: copy.deepcopy(start),
        "trim": by(whole),
        "chunked_loss": by(passes.ChunkedLoss()),
        "trim + chunked_loss": by(whole, passes.ChunkedLoss()),
    }
    vocabulary = start.get_input_embeddings().num_embeddings
    rows = rows_of(models, batches, "AdamW")
    return {"used": len(used), "vocabulary": vocabulary, "rows": rows}


def flat_lora() -> dict[str, Any]:
    start, tokenizer = smollm2(layers=LAYERS)
    batches = list(token_rows(kjv(), tokenizer, LENGTH, 8 * BATCH).split(BATCH))
    lora = adapted(start, RANK)
    models = {
        "LoRA r=16 (peft)": lambda: copy.deepcopy(lora),
        "flat_lora": lambda: surgery.apply(copy.deepcopy(lora), [passes.FlatLora()]),
    }
    return {"rows": rows_of(models, batches, "LoRA r=16 (peft)")}


if __name__ == "__main__":
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], Any]] = {"trim": trim, "flat_lora": flat_lora}
    run_parts("trim_and_flat_lora", parts, [], batch=[BATCH, LENGTH], layers=LAYERS)
