"""Peaks and times of whole steps on a GPU: predicted here, on a CPU, beside those measured there.

    python -m benchmarks.prediction_gpu [words of rows ...]

Llama of 1.24 B parameters, bfloat16, 4 x 2,048 tokens, as benchmarks/gpu measures it.
"""

from __future__ import annotations

import functools
import sys
import time
from typing import Any

import torch

from benchmarks.common import load, save
from benchmarks.gpu.rows import LLAMA
from surgery.catalogue import resolve
from surgery.prediction.devices import device_named
from surgery.prediction.loop import Loop, foresee

BOTH = ("recompute", "chunked_loss")
# row -> passes, gradient checkpointing, LoRA; measured on an H100 by benchmarks/gpu's first form:
# GiB at the peak, milliseconds. None: only the rows of results/gpu_runs.json.
ROWS: dict[str, tuple[tuple[str, ...], bool, bool, tuple[float, float] | None]] = {
    "eager AdamW": ((), False, False, (32.10, 178)),
    "checkpointing": ((), True, False, (19.34, 216)),
    "LoRA r=16": ((), False, True, (33.56, 256)),
    "LoRA + checkpointing": ((), True, True, (14.80, 348)),
    "recompute + chunked_loss": (BOTH, False, False, None),
    "recompute + chunked_loss + checkpointing": (BOTH, True, False, None),
    "misa 3 % + recompute + chunked_loss": (("misa", *BOTH), False, False, None),
    "misa 3 % + chunked_loss + checkpointing": (("misa", "chunked_loss"), True, False, None),
    "rso + recompute + chunked_loss": (("rso", *BOTH), False, False, None),
    "velora + recompute + chunked_loss": (("velora", *BOTH), False, False, None),
    "mezo": (("mezo",), False, False, None),
}


def llama(checkpointing: bool, lora: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**LLAMA)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).bfloat16().train()
        model.tie_weights()
        if lora:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def main() -> None:
    words = sys.argv[1:]
    rows = load("prediction_gpu").get("rows", {})
    measured = load("gpu_runs")
    for name, (passes, checkpointing, lora, noted) in ROWS.items():
        if words and not any(word in name for word in words):
            continue
        ids = torch.empty((4, 2048), dtype=torch.long, device="meta")
        make = functools.partial(torch.optim.AdamW, fused=True)
        if "mezo" in passes:
            make = functools.partial(torch.optim.SGD, lr=1e-4)
        for device in ("h100", "h200"):
            real = measured.get(device, {}).get("steps", {}).get(name)
            known = (real["peak_gib"], real["ms"]) if real else noted if device == "h100" else None
            if known is None:
                continue
            started = time.perf_counter()
            step = foresee(
                llama(checkpointing, lora),
                {"input_ids": ids, "labels": ids},
                resolve(list(passes), {}) if passes else (),
                Loop(optimizer=make, device=device_named(device)),
            )
            found = {
                "peak_gib": round(step.peak / 2**30, 2),
                "measured_gib": known[0],
                "ms": round(step.milliseconds or 0.0, 1),
                "measured_ms": known[1],
                "phase": step.phase,
                "launches": step.launches,
                "seconds": round(time.perf_counter() - started, 1),
            }
            rows[f"{name} | {device}"] = found
            print(f"{name:42s} {device} {found}", flush=True)
    save("prediction_gpu", {"rows": rows})


if __name__ == "__main__":
    main()
