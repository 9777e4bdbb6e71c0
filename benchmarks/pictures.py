"""Pictures of README and docs/memory.md: memory over a step, and bytes against time.

    python -m benchmarks.pictures

A Llama of SmolLM2-135M's shape, four of its thirty blocks, random weights, float32, 2 rows of 512
tokens, AdamW, on a CPU, one thread. Over a step: predicted, with the peak that a real run has had.
Against time: real steps of every composition that `surgery.fit` tries; CPU seconds of the process,
so that what else the machine does counts little.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.optim import SGD, AdamW
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import surgery
from benchmarks.common import load, save, standing_and_peak
from benchmarks.plots import PICTURES
from benchmarks.prediction import forget
from surgery.catalogue import resolve
from surgery.prediction.loop import Loop, foresee
from surgery.reports import pictures
from surgery.reports.compositions import GROUPS, Composition

SHAPE: dict[str, Any] = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=4,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
ROWS, LENGTH, STEPS = 2, 512, 2
AFTER = ("misa", "recompute", "chunked_loss")
SLOPES = {name for group in GROUPS["forwards"] for one in group for name in one.names}


@dataclass(frozen=True)
class Point:
    spec: tuple[str, ...]
    title: str
    peak: int
    milliseconds: float


def llama(checkpointing: bool = False) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 49152, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def title(one: Composition) -> str:
    return " + ".join([*one.names, *(["checkpointing"] if one.checkpointing else [])]) or "plain"


def measured(one: Composition) -> dict[str, float]:
    """Return the peak of a real step, weights and all, in bytes, and its CPU milliseconds."""
    kept: list[Any] = []

    def begin() -> Callable[[], None]:
        model = llama(one.checkpointing)
        if one.names:
            surgery.apply(model, list(one.names), compile=False)
        make = partial(SGD, lr=1e-6) if SLOPES & set(one.names) else partial(AdamW, lr=1e-6)
        kept.extend([model, batch(), make([p for p in model.parameters() if p.requires_grad])])
        step()
        gc.collect()
        return step

    def step() -> None:
        model, inputs, optimizer = kept
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    _, peak = standing_and_peak(begin)
    seconds = []
    for _ in range(STEPS):
        began = time.process_time()
        step()
        seconds.append(time.process_time() - began)
    return {"peak": peak, "milliseconds": 1e3 * statistics.median(seconds)}


def main() -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows: dict[str, Any] = load("pictures").get("rows", {})
    tried = [one for group in (*GROUPS["full"], *GROUPS["forwards"]) for one in group]
    for one in tried:
        if title(one) not in rows:
            rows[title(one)] = measured(one)
            print(title(one), rows[title(one)], flush=True)
            save("pictures", {"tokens": [ROWS, LENGTH], "rows": rows})
            forget()
    points = [Point(one.names, title(one), **rows[title(one)]) for one in tried]
    pictures.bytes_against_time(points, PICTURES / "bytes_against_time.png")
    after = " + ".join(AFTER)
    with torch.device("meta"):
        model = llama()
    steps = {
        "plain AdamW": foresee(model, batch(), (), Loop()),
        after: foresee(model, batch(), resolve(list(AFTER), {}), Loop()),
    }
    real = {"plain AdamW": rows["plain"]["peak"], after: rows[after]["peak"]}
    pictures.memory(steps, PICTURES / "memory_of_a_step.png", real)


if __name__ == "__main__":
    main()
