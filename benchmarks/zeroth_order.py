"""Steps of zeroth-order training beside MeZO as published: time and peak bytes.

    python -m benchmarks.zeroth_order [words of the parts]

MeZO as published is written down from the paper's Algorithm 1 and its code: four sweeps over the
weights with torch's Gaussian, reseeded each time. (The published code adds out of place, with two
or three temporaries of each weight; ours here adds in place, which is faster.)
"""

from __future__ import annotations

import copy
import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.utils import logging

import surgery
from benchmarks.common import alternate, peak_of_step, ratio, run_parts, step_of
from examples.real import kjv, smollm2, token_rows
from surgery import memory

EPS, LR = 1e-3, 1e-7
PUBLISHED = "MeZO as published"
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "mezo": ("mezo", {}),
    "mezo, gaussian": ("mezo", {"noise": "gaussian"}),
    "sparse_mezo": ("sparse_mezo", {}),
    "sparse_mezo, random mask": ("sparse_mezo", {"mask": "random"}),
    "lozo": ("lozo", {}),
    "subzero": ("subzero", {}),
}
BATCH = (4, 64)


def published(model: Any, batches: Sequence[torch.Tensor]) -> Callable[[], None]:
    """Return a step of MeZO as published."""
    turn = 0

    def perturb(seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            z = torch.normal(mean=0.0, std=1.0, size=parameter.shape, dtype=parameter.dtype)
            parameter.add_(z, alpha=scale)

    @torch.inference_mode()
    def loss() -> torch.Tensor:
        ids = batches[turn % len(batches)]
        return model(input_ids=ids, labels=ids).loss

    @torch.no_grad()
    def step() -> None:
        nonlocal turn
        perturb(turn, EPS)
        plus = loss()
        perturb(turn, -2 * EPS)
        slope = ((plus - loss()) / (2 * EPS)).item()
        perturb(turn, EPS)
        perturb(turn, -LR * slope)
        turn += 1

    return step


def ours(model: Any, name: str, options: dict[str, Any], batches: Sequence[torch.Tensor]) -> Any:
    surgery.apply(model, name, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    return optimizer, step_of(model, optimizer, batches)


def compare(layers: int | None) -> dict[str, Any]:
    logging.set_verbosity_error()
    model, tokenizer = smollm2(layers=layers)
    model.config.use_cache = False
    rows, length = BATCH
    batches = token_rows(kjv(), tokenizer, length, 4 * rows).split(rows)
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    peaks = _peaks(model, batches)
    steps: dict[str, Callable[[], None]] = {PUBLISHED: published(copy.deepcopy(model), batches)}
    for row, (name, options) in OURS.items():
        steps[row] = ours(copy.deepcopy(model), name, options, batches)[1]
    plain = copy.deepcopy(model)

    @torch.no_grad()
    def forward() -> None:
        plain(input_ids=batches[0], labels=batches[0])

    steps["a forward alone"] = forward
    seconds = alternate(steps, times=9, warm_up=2)
    result: dict[str, Any] = {}
    for row in steps:
        result[row] = peaks.get(row, {}) | {
            "milliseconds": round(1e3 * statistics.median(seconds[row]), 1),
            "time_over_published": round(ratio(seconds, row, PUBLISHED), 3),
            "time_over_mezo": round(ratio(seconds, row, "mezo"), 3),
        }
        print(row, result[row], flush=True)
    return {
        "batch": BATCH,
        "parameters": sum(p.numel() for p in model.parameters()),
        "largest_weight_megabytes": round(max(sizes) / 1e6, 1),
        "rows": result,
    }


def _peaks(model: Any, batches: Sequence[torch.Tensor]) -> dict[str, dict[str, Any]]:
    """Return megabytes at the peak of a step, on top of the weights, and over the bound."""
    device = torch.device("cpu")
    ids = batches[0]

    @torch.no_grad()
    def forward() -> Any:
        return model(input_ids=ids, labels=ids).loss

    forward()
    plain = memory.measure(forward, device).peak
    standing = memory.storage_bytes(model.parameters())
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    bound = plain + 1.1 * largest + (64 << 20)
    found = {"a forward alone": {"peak_megabytes": round(plain / 1e6, 1)}}
    one = copy.deepcopy(model)
    step = published(one, batches)
    step()
    found[PUBLISHED] = {"peak_megabytes": round(memory.measure(step, device).peak / 1e6, 1)}
    for row, (name, options) in OURS.items():
        torch._dynamo.reset()
        gc.collect()
        one = copy.deepcopy(model)
        optimizer, step = ours(one, name, options, batches)
        peak = peak_of_step(one, optimizer, step) - standing
        found[row] = {
            "peak_megabytes": round(peak / 1e6, 1),
            "peak_over_bound": round(peak / bound, 3),
        }
    torch._dynamo.reset()
    return found


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "SmolLM2, 8 blocks": lambda: compare(8),
    "SmolLM2, 30 blocks": lambda: compare(None),
}


def main(parts: Sequence[str]) -> None:
    """Run the parts whose names contain one of the words given (default: all)."""
    torch._dynamo.config.cache_size_limit = 64
    run_parts("zeroth_order", PARTS, parts)


if __name__ == "__main__":
    main(sys.argv[1:])
