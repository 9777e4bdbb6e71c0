"""MISA at 3 % beside what a user would pick instead, on SmolLM2 (8 blocks) and the KJV text.

    python -m benchmarks.sampling

Peak bytes and time per step in one run, alternating; then held-out loss after equal steps (shorter
rows), 3 seeds, each method at the better of two learning rates (chosen on another seed, with fewer
steps). Checkpointing computes what AdamW computes, so it has no losses of its own.
The model keeps the first 8 of 30 blocks, so it starts out broken and first has to recover.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from badam import BlockOptimizer  # pyright: ignore[reportMissingImports] # in the bench extra
from peft import LoraConfig, get_peft_model
from transformers.utils import logging

import passes
import surgery
from benchmarks.common import alternate, held_out, peak_of_step, ratio, save, step_of
from examples.real import kjv, smollm2, token_rows

BATCH, LENGTH, STEPS, PILOT, PERIOD = 2, 128, 100, 40, 10
MEASURED_LENGTH = 512  # tokens in a row when bytes and time are measured
ONE_BLOCK = 0.0626  # budget that holds as many parameters as a block of this model has
RATES = (3e-4, 1e-3)
SEEDS = (1, 2, 3)

Method = Callable[[Any, float, int], tuple[Any, Any]]


def adamw(model: Any, lr: float, seed: int) -> tuple[Any, Any]:
    return model, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


def checkpointing(model: Any, lr: float, seed: int) -> tuple[Any, Any]:
    model.gradient_checkpointing_enable()
    return adamw(model, lr, seed)


def lora(model: Any, lr: float, seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    return adamw(get_peft_model(model, LoraConfig(r=16, target_modules="all-linear")), lr, seed)


def by(make: Callable[[int], Any]) -> Method:
    def build(model: Any, lr: float, seed: int) -> tuple[Any, Any]:
        return adamw(surgery.apply(model, make(seed)), lr, seed)

    return build


def badam_package(model: Any, lr: float, seed: int) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    return model, BlockOptimizer(
        base_optimizer=torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0),
        named_parameters_list=list(model.named_parameters()),
        switch_block_every=PERIOD,
        switch_mode="random",
        verbose=0,
    )


METHODS: dict[str, Method] = {
    "AdamW": adamw,
    "AdamW + checkpointing": checkpointing,
    "LoRA r=16 (peft)": lora,
    "badam (package)": badam_package,
    "badam": by(lambda seed: passes.BAdam(period=PERIOD, seed=seed)),
    "lisa, 2 blocks": by(lambda seed: passes.Lisa(layers=2, period=PERIOD, seed=seed)),
    "misa 3 %": by(lambda seed: passes.Misa(budget=0.03, period=PERIOD, seed=seed)),
    "misa, a block's budget": by(
        lambda seed: passes.Misa(budget=ONE_BLOCK, period=PERIOD, seed=seed)
    ),
    "misa 3 %, uniform": by(lambda seed: passes.Misa(eta=0.0, period=PERIOD, seed=seed)),
    "misa 3 %, span 1": by(lambda seed: passes.Misa(span=1, period=PERIOD, seed=seed)),
}


def train(start: Any, method: str, lr: float, seed: int, rows: Any, test: Any, steps: int) -> float:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    model, optimizer = METHODS[method](copy.deepcopy(start), lr, seed)
    step = step_of(model, optimizer, list(rows[order].split(BATCH))[:steps])
    for _ in range(steps):
        step()
    return held_out(model, test, 4)


def main() -> None:
    logging.set_verbosity_error()
    start, tokenizer = smollm2(layers=8)
    start.train()
    tokens = token_rows(kjv(), tokenizer, LENGTH, BATCH * STEPS * 2 + 32)
    test, rows = tokens[:32], tokens[32:]
    batches = list(token_rows(kjv(), tokenizer, MEASURED_LENGTH, 16 * BATCH).split(BATCH))

    block = sum(p.numel() for p in start.model.layers[0].parameters())
    assert 0 < ONE_BLOCK * sum(p.numel() for p in start.parameters()) - block < block / 100
    built = {name: make(copy.deepcopy(start), 1e-5, 0) for name, make in METHODS.items()}
    steps = {name: step_of(m, o, batches) for name, (m, o) in built.items()}
    seconds = alternate(steps, times=2 * PERIOD, warm_up=2)
    result: dict[str, Any] = {
        name: {
            "milliseconds": round(1e3 * statistics.median(seconds[name]), 1),
            "time_over_adamw": round(ratio(seconds, name, "AdamW"), 3),
            "peak_megabytes": round(
                max(peak_of_step(m, getattr(o, "base_optimizer", o), steps[name]) for _ in range(3))
                / 1e6,
                1,
            ),
        }
        for name, (m, o) in built.items()
    }
    del built, steps
    before = held_out(start, test, 4)
    for name in METHODS:
        if METHODS[name] is checkpointing:
            continue
        pilots = {lr: train(start, name, lr, 0, rows, test, PILOT) for lr in RATES}
        lr = min(pilots, key=lambda rate: pilots[rate])
        losses = [train(start, name, lr, seed, rows, test, STEPS) for seed in SEEDS]
        result[name] |= {
            "lr": lr,
            "pilot_losses": {str(rate): round(loss, 4) for rate, loss in pilots.items()},
            "held_out_losses": [round(loss, 4) for loss in losses],
            "held_out_mean": round(statistics.fmean(losses), 4),
        }
        print(name, result[name], flush=True)
        setting = {
            "batch": [BATCH, LENGTH],
            "batch_measured": [BATCH, MEASURED_LENGTH],
            "steps": STEPS,
            "period": PERIOD,
            "seeds": SEEDS,
        }
        save("sampling", {"setting": setting, "held_out_before": before, "methods": result})


if __name__ == "__main__":
    main()
