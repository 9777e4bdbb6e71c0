"""Fine-tuning at equal memory: held-out loss under budgets of bytes, and after equal time.

    python -m benchmarks.finetuning [small | full] [--seconds 480]

SmolLM2-135M whole (30 blocks). full: bf16 weights and float32 coordinates, 16 x 256 tokens a step,
600 steps, on a GPU. small: float32, 2 x 128 tokens, 24 steps, on two cores. The text is the
dictionary's definitions as questions and answers; what is forgotten is the loss on the Bible.
A batch is computed in as few parts as the budget of bytes allows, with and without the exact
passes (recompute and chunked_loss): the losses are the same, so a method's loss counts for a budget
when one of its ways to compute it fits. Budgets are shares of the peak of full AdamW.
Each method at the best of three learning rates or more, until the largest is not the best (chosen
on seed 0), then three other seeds.
A call begins no run that would end after so many seconds, and keeps what is done: call it again.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers.utils import logging

import passes
import surgery
from benchmarks import corpus
from benchmarks.arms import dense, lora, ours
from benchmarks.common import (
    OutOfTime,
    chosen,
    clock_of,
    interval,
    load,
    peak_of_step,
    save,
    summary,
    train_all,
    warmed_cosine,
)
from benchmarks.pretraining import last
from examples.real import smollm2

RUNS = "finetuning_runs"
PILOT, SEEDS = 0, (1, 2, 3)
SHARES = (0.40, 0.25, 0.15, 0.10)  # of full AdamW's peak


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large a run is. batch: rows x tokens of a step. evaluations: of a run, evenly spaced."""

    batch: tuple[int, int]
    steps: int
    pilot: int
    period: int
    dtype: torch.dtype
    device: str
    held_out: int  # rows
    evaluations: int


SCALES = {
    "small": Scale(
        batch=(2, 128),
        steps=24,
        pilot=12,
        period=4,
        dtype=torch.float32,
        device="cpu",
        held_out=16,
        evaluations=2,
    ),
    "full": Scale(
        batch=(16, 256),
        steps=600,
        pilot=150,
        period=50,
        dtype=torch.bfloat16,
        device="cuda",
        held_out=256,
        evaluations=4,
    ),
}


def rows_of(scale: Scale, tokenizer: Any, part: str, source: str) -> Tensor:
    """Return (n, length) tokens of a source: enough for all steps, or what is held out."""
    count, length = scale.batch
    wanted = (scale.steps * count if part == "train" else scale.held_out) * length
    ids: list[int] = []
    for text in corpus.texts(part, source):
        if len(ids) >= wanted:
            break
        ids += tokenizer(asked(text) if source == "gcide" else text).input_ids
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def asked(text: str) -> str:
    """Return entries of the dictionary as questions and answers."""
    question = r"Question: What does \1 mean?\nAnswer: \2\n"
    return re.sub(r"^([^:\n]+): (.*)$", question, text, flags=re.MULTILINE)


# -- methods: period -> way to train; learning rates -----------------------------------------------


def sampled(kind: Any, **options: Any) -> Any:
    return lambda t, also: partial(ours, kind=kind, period=t, also=also, **options)


def adapters(rank: int, **options: Any) -> Any:
    def way(t: int, also: Any) -> Callable[..., Any]:
        def build(model: Any, lr: float, rest: float | None, seed: int) -> Any:
            model, optimizer = lora(model, lr, None, seed, rank=rank, **options)
            return surgery.apply(model, list(also)) if also else model, optimizer

        return build

    return way


def full(t: int, also: Any) -> Callable[..., Any]:
    def build(model: Any, lr: float, rest: float | None, seed: int) -> Any:
        found = dense(model, lr, lr, seed, torch.optim.AdamW)
        return surgery.apply(found[0], list(also)) if also else found[0], found[1]

    return build


LOW, MIDDLE, HIGH = (1e-5, 3e-5, 1e-4), (3e-5, 1e-4, 3e-4), (1e-4, 3e-4, 1e-3)
METHODS: dict[str, tuple[Any, tuple[float, ...]]] = {
    "AdamW, all weights": (full, LOW),
    "LoRA r=16": (adapters(16), HIGH),
    "LoRA r=64": (adapters(64), HIGH),
    "DoRA r=16": (adapters(16, use_dora=True), HIGH),
    "lisa, 2 blocks": (sampled(passes.Lisa, layers=2), LOW),
    "badam": (sampled(passes.BAdam), MIDDLE),
    "misa 1 %": (sampled(passes.Misa, budget=0.01), MIDDLE),
    "misa 3 %": (sampled(passes.Misa, budget=0.03), MIDDLE),
    "misa 10 %": (sampled(passes.Misa, budget=0.10), MIDDLE),
    "rso r=64": (lambda t, also: partial(ours, kind=passes.Rso, rank=64, also=also), HIGH),
    "velora": (lambda t, also: partial(ours, kind=passes.Velora, also=also), LOW),
    "galore r=64": (lambda t, also: partial(ours, kind=passes.Galore, rank=64, also=also), HIGH),
}
EXACT = (passes.Recompute(), passes.ChunkedLoss())


def built(size: str, method: str, lr: float, seed: int, also: Any = ()) -> tuple[Any, Any, Any]:
    logging.set_verbosity_error()
    scale = SCALES[size]
    model, tokenizer = smollm2()
    model = model.to(scale.device, scale.dtype).train()
    return *METHODS[method][0](scale.period, also)(model, lr, None, seed), tokenizer


def loss_on(model: Any, tokenizer: Any, scale: Scale, source: str) -> float:
    """Return the loss on what is held out of a source."""
    ids = rows_of(scale, tokenizer, "held_out", source)[: scale.held_out].to(scale.device)
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=p, labels=p).loss.item() for p in ids.split(scale.batch[0])]
    model.train()
    return round(statistics.fmean(losses), 4)


def before(size: str) -> dict[str, float]:
    """Return the losses of the model that all runs begin with."""
    scale = SCALES[size]
    clock_of(scale.device)
    model, tokenizer = smollm2()
    model = model.to(scale.device, scale.dtype)
    return {source: loss_on(model, tokenizer, scale, source) for source in ("gcide", "kjv")}


def train(size: str, method: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Return held-out losses on the way, and after a whole run the loss on other text."""
    scale = SCALES[size]
    torch._dynamo.reset()
    clock = clock_of(scale.device)
    model, optimizer, tokenizer = built(size, method, lr, seed)
    rows = rows_of(scale, tokenizer, "train", "gcide")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    count, whole = scale.batch[0], steps == scale.steps
    schedule = warmed_cosine(optimizer, steps, max(steps // 20, 1))
    found: dict[str, Any] = {"losses": {}}
    seconds = 0.0
    for n in range(steps):
        start = clock()
        places = order[torch.arange(n * count, (n + 1) * count) % len(order)]
        ids = rows[places].to(scale.device)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds += clock() - start
        if (n + 1) % (steps // (scale.evaluations if whole else 1)) == 0:
            found["losses"][str(n + 1)] = loss_on(model, tokenizer, scale, "gcide")
    if whole:
        found["other"] = loss_on(model, tokenizer, scale, "kjv")
    return found | {"seconds": round(seconds, 1)}


def cost(size: str, method: str, rows: int, exact: bool) -> dict[str, float]:
    """Return peak bytes, and on a GPU milliseconds, of a step whose batch comes in parts of so many
    rows."""
    scale = SCALES[size]
    clock = clock_of(scale.device)
    model, optimizer, tokenizer = built(size, method, 1e-5, 0, EXACT if exact else ())
    ids = rows_of(scale, tokenizer, "train", "gcide")[: scale.batch[0]].to(scale.device)
    parts = ids.split(rows)

    def step() -> None:
        for part in parts:
            (model(input_ids=part, labels=part).loss / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()

    found = {"peak_megabytes": round(peak_of_step(model, optimizer, step) / 1e6, 1)}
    if scale.device == "cpu":  # two runs at a time share its memory; `train` has their own clock
        return found
    seconds = []
    for _ in range(7):
        start = clock()
        step()
        torch.cuda.synchronize()
        seconds.append(clock() - start)
    return found | {"milliseconds_a_step": round(1e3 * statistics.median(seconds), 1)}


# -- what they say ---------------------------------------------------------------------------------


def compare(size: str, until: float) -> dict[str, Any]:
    scale = SCALES[size]
    count = scale.batch[0]
    ways = [(rows, exact) for rows in (count, max(count // 4, 1)) for exact in (False, True)]
    parts = [(size, m, rows, exact) for m in METHODS for rows, exact in ways]
    costs = train_all(f"{RUNS}_cost", cost, parts, until)
    begun = train_all(f"{RUNS}_begun", before, [(size,)], until)[size,]
    rates = {m: list(own) for m, (_, own) in METHODS.items()}
    while True:  # the largest rate that was tried is no method's best
        tried = {m: {lr: (size, m, lr, PILOT, scale.pilot) for lr in rates[m]} for m in METHODS}
        pilots, best = chosen(RUNS, train, tried, last, until)
        ends = [m for m in METHODS if best[m] == max(rates[m])]
        if not ends:
            break
        for m in ends:
            rates[m].append(float(f"{best[m] * 10**0.5:.0e}"))
    whole = [(size, m, best[m], seed, scale.steps) for seed in SEEDS for m in METHODS]
    runs = train_all(RUNS, train, whole, until)
    reference = costs[size, "AdamW, all weights", count, False]["peak_megabytes"]
    rows: dict[str, Any] = {}
    for m in METHODS:
        found = [runs[size, m, best[m], seed, scale.steps] for seed in SEEDS]
        losses = [last(run) for run in found]
        rows[m] = {
            "lr": best[m],
            "pilot_losses": {str(lr): last(pilots[job]) for lr, job in tried[m].items()},
            **summary(losses),
            "interval": interval(losses),
            "seconds_a_step": round(
                statistics.median(run["seconds"] for run in found) / scale.steps, 3
            ),
            "forgotten": round(statistics.fmean(run["other"] for run in found) - begun["kjv"], 4),
            "ways": {
                f"{part} rows{', exact passes' * exact}": costs[size, m, part, exact]
                for part, exact in ways
            },
        }
        least = min(way["peak_megabytes"] for way in rows[m]["ways"].values())
        rows[m]["smallest_share"] = round(least / reference, 3)
        rows[m]["fits"] = {str(share): least <= share * reference for share in SHARES}
    setting = {"batch": scale.batch, "steps": scale.steps, "pilot_steps": scale.pilot}
    setting |= {"period": scale.period, "seeds": SEEDS, "begun": begun}
    return setting | {"rows": rows}


def main(
    part: Annotated[str, typer.Argument(help="small or full")] = "small", seconds: float = math.inf
) -> None:
    """Train what is missing, and write the rows when all is there."""
    corpus.about()
    try:
        found = compare(part, time.time() + seconds)
    except OutOfTime as left:
        raise SystemExit(f"{left}: call it again") from None
    save("finetuning", load("finetuning") | {part: found})


if __name__ == "__main__":
    typer.run(main)
