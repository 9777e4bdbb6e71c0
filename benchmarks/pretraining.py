"""Pre-training from scratch for long: held-out loss against tokens, and against peak bytes.

    python -m benchmarks.pretraining [small | full | factors | narrow] [--seconds 480]

full: a Llama of 34 M parameters (hidden 512, 8 blocks) on the corpus of `benchmarks.corpus`, 64 x
256 tokens a step, bf16 autocast, 2,500 steps; runs side by side on one GPU. small: 9 M parameters,
4 x 128 tokens, for two cores. factors: what makes rso trail GaLore, one option changed at a time;
narrow: a quarter of the tokens a step.
Norms, embeddings and head are trained by plain AdamW in all rows but badam's, which has no way to.
Each method at the best of three learning rates (chosen on seed 0), then three other seeds.
A call begins no run that would end after so many seconds, and keeps what is done: call it again.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
import transformers
import typer
from apollo_torch import APOLLOAdamW  # pyright: ignore[reportMissingImports] # in the bench extra
from galore_torch import GaLoreAdamW  # pyright: ignore[reportMissingImports] # in the bench extra
from transformers.utils import logging

import passes
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

RUNS = "pretraining_runs"
PILOT, SEEDS = 0, (1, 2, 3)
REST = 2e-3  # learning rate of norms, embeddings and head


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large a run is. batch: rows x tokens. pilot: steps in which a rate is chosen."""

    hidden: int
    layers: int
    batch: tuple[int, int]
    steps: int
    pilot: int
    rank: int
    period: int
    device: str
    held_out: int  # rows
    marks: int = 10  # held-out losses on the way


SCALES = {
    "small": Scale(
        hidden=256,
        layers=6,
        batch=(4, 128),
        steps=150,
        pilot=60,
        rank=64,
        period=50,
        device="cpu",
        held_out=48,
        marks=3,
    ),
    "full": Scale(
        hidden=512,
        layers=8,
        batch=(64, 256),
        steps=2500,
        pilot=500,
        rank=128,
        period=200,
        device="cuda",
        held_out=512,
    ),
}
SCALES["narrow"] = replace(SCALES["full"], batch=(16, 256))


def model_of(scale: Scale) -> Any:
    logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=corpus.VOCABULARY,
        hidden_size=scale.hidden,
        intermediate_size=scale.hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.hidden // 64,
        max_position_embeddings=scale.batch[1],
    )
    model: Any = transformers.LlamaForCausalLM(config)
    return model.train().to(scale.device)


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    kind = ids.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        return model(input_ids=ids, labels=ids).loss


# -- methods ---------------------------------------------------------------------------------------


def published(kind: Any, scale: float, **options: Any) -> Any:
    return lambda r, t: partial(
        dense, kind=kind, rank=r, update_proj_gap=t, scale=scale, proj_type="std", **options
    )


def own(kind: Any, **options: Any) -> Any:
    return lambda r, t: partial(ours, kind=kind, **{"rank": r, "period": t} | options)


def sampled(kind: Any, **options: Any) -> Any:
    return lambda r, t: partial(ours, kind=kind, period=t // 4, **options)


GALORE = partial(GaLoreAdamW, no_deprecation_warning=True)
RATES = {"low": (3e-4, 1e-3, 3e-3), "high": (3e-3, 1e-2, 3e-2)}
# name -> (rank, period) -> way to train; which learning rates
METHODS: dict[str, tuple[Any, str]] = {
    "AdamW": (lambda r, t: partial(dense, kind=torch.optim.AdamW), "low"),
    "GaLore (galore-torch)": (published(GALORE, 0.25), "high"),
    "galore": (own(passes.Galore), "high"),
    "APOLLO (apollo-torch)": (
        published(APOLLOAdamW, 1.0, proj="random", scale_type="channel"),
        "high",
    ),
    "rso": (own(passes.Rso), "low"),
    "rso, transport": (own(passes.Rso, on_resample="transport"), "low"),
    "LoRA (peft)": (lambda r, t: partial(lora, rank=r), "low"),
    "LoRA, merged each period": (lambda r, t: partial(lora, rank=r, merged=t), "low"),
    "velora": (lambda r, t: partial(ours, kind=passes.Velora), "low"),
    "misa 25 %": (sampled(passes.Misa, budget=0.25), "low"),
    "misa 25 %, uniform": (sampled(passes.Misa, budget=0.25, eta=0.0), "low"),
    "lisa, 2 blocks": (sampled(passes.Lisa, layers=2), "low"),
    "badam": (sampled(passes.BAdam), "low"),
}
MAIN = tuple(METHODS)
FACTORS: dict[str, Any] = {
    "rso, period / 4": lambda r, t: own(passes.Rso)(r, t // 4),
    "rso, period x 5": lambda r, t: own(passes.Rso)(r, t * 5),
    "rso, rank / 2": lambda r, t: own(passes.Rso)(r // 2, t),
    "rso, rank x 2": lambda r, t: own(passes.Rso)(r * 2, t),
    "rso, orthonormal": own(passes.Rso, projection="orthonormal"),
    "rso, a P for each weight": own(passes.Rso, share=False),
    "galore, random P": own(passes.Galore, projection="random"),
    "galore, state dropped": own(passes.Galore, on_resample="reset"),
    "galore, period x 5": lambda r, t: own(passes.Galore)(r, t * 5),
}
METHODS |= {name: (way, METHODS[name.split(",")[0]][1]) for name, way in FACTORS.items()}


# -- runs ------------------------------------------------------------------------------------------


def train(size: str, method: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Return held-out losses on the way, and milliseconds of a step."""
    scale = SCALES[size]
    device, clock = scale.device, clock_of(scale.device)
    torch._dynamo.reset()
    count, length = scale.batch
    test = corpus.rows("held_out", length)
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    test = test[order[: scale.held_out]].to(device)
    rows = corpus.rows("train", length)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    order = order.repeat(math.ceil(steps * count / len(rows)))[: steps * count]
    way = METHODS[method][0](scale.rank, scale.period)
    model, optimizer = way(model_of(scale), lr, REST, seed)
    schedule = warmed_cosine(optimizer, steps, steps // 10)

    def step(n: int) -> None:
        loss_of(model, rows[order[n * count : (n + 1) * count]].to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    @torch.no_grad()
    def held_out() -> float:
        model.eval()
        found = statistics.fmean(loss_of(model, ids).item() for ids in test.split(count))
        model.train()
        return round(found, 4)

    marks = {math.ceil(steps * (i + 1) / scale.marks) for i in range(scale.marks)}
    losses: dict[str, float] = {}
    for n in range(2):  # captures
        step(n)
    start, aside = clock(), 0.0
    for n in range(2, steps):
        step(n)
        if n + 1 in marks:
            now = clock()
            losses[str(n + 1)] = held_out()
            aside += clock() - now
    seconds = clock() - start - aside
    return {"losses": losses, "milliseconds_a_step": round(1e3 * seconds / (steps - 2), 1)}


def peak(size: str, method: str) -> float:
    """Return the peak megabytes of what is trained and a step."""
    scale = SCALES[size]
    torch._dynamo.reset()
    way = METHODS[method][0](scale.rank, scale.period)
    model, optimizer = way(model_of(scale), 1e-3, REST, 0)
    ids = corpus.rows("train", scale.batch[1])[: scale.batch[0]].to(scale.device)

    def step() -> None:
        loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return round(peak_of_step(model, optimizer, step) / 1e6, 1)


# -- what they say ---------------------------------------------------------------------------------


def last(run: dict[str, Any]) -> float:
    return list(run["losses"].values())[-1]


def compare(size: str, methods: tuple[str, ...], until: float) -> dict[str, Any]:
    """Return a row for each method: chosen learning rate, losses, interval, bytes, time."""
    scale = SCALES[size]
    tried = {
        m: {lr: (size, m, lr, PILOT, scale.pilot) for lr in RATES[METHODS[m][1]]} for m in methods
    }
    peaks = train_all(f"{RUNS}_peak", peak, [(size, m) for m in methods], until)
    pilots, best = chosen(RUNS, train, tried, last, until)
    jobs = {m: [(size, m, best[m], seed, scale.steps) for seed in SEEDS] for m in methods}
    # All methods at a seed before the next seed: a call that ends early has whole columns.
    runs = train_all(RUNS, train, [jobs[m][i] for i in range(len(SEEDS)) for m in methods], until)
    rows: dict[str, Any] = {}
    for m in methods:
        found = [runs[job] for job in jobs[m]]
        losses = [last(run) for run in found]
        rows[m] = {
            "lr": best[m],
            "pilot_losses": {str(lr): last(pilots[job]) for lr, job in tried[m].items()},
            **summary(losses),
            "interval": interval(losses),
            "curve": {
                mark: round(statistics.fmean(run["losses"][mark] for run in found), 4)
                for mark in found[0]["losses"]
            },
            "peak_megabytes": peaks[size, m],
            "milliseconds_a_step": statistics.median(r["milliseconds_a_step"] for r in found),
        }
    setting = {"batch": scale.batch, "steps": scale.steps, "pilot_steps": scale.pilot}
    return setting | {"rank": scale.rank, "period": scale.period, "seeds": SEEDS, "rows": rows}


def main(
    part: Annotated[str, typer.Argument(help="small, full, factors or narrow")] = "small",
    seconds: float = math.inf,
) -> None:
    """Train what is missing, and write the rows when all is there."""
    corpus.about()
    size = "full" if part == "factors" else part
    chosen = {"factors": ("rso", "galore", *FACTORS), "narrow": ("rso", "galore", "AdamW")}
    try:
        found = compare(size, chosen.get(part, MAIN), time.time() + seconds)
    except OutOfTime as left:
        raise SystemExit(f"{left}: call it again") from None
    save("pretraining", load("pretraining") | {part: found})


if __name__ == "__main__":
    typer.run(main)
