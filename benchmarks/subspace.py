"""RSO and GaLore beside what a user would pick instead: GaLore, APOLLO, LoRA, LoRA-FA, full AdamW.

    python -m benchmarks.subspace [words of the parts]

(a) A Llama of 4 blocks (hidden 256) from scratch on the KJV text, cut into 2,048 kinds of tokens;
norms, embeddings and head trained by plain AdamW in all rows. (b) Fine-tuning SmolLM2 (8 blocks):
only the Linears of the blocks are trained. For each: time per step, alternating, and peak bytes;
then held-out loss with 3 seeds, each method at the best of its learning rates (chosen on another
seed, with fewer steps). What happens once in a period (an SVD, a redraw) is timed by a row of
period 1 and counted as 1/period of the steps. Losses are computed one thread to a run.
"""

from __future__ import annotations

import copy
import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import transformers
from apollo_torch import APOLLOAdamW  # pyright: ignore[reportMissingImports] # in the bench extra
from galore_torch import GaLoreAdamW  # pyright: ignore[reportMissingImports] # in the bench extra
from tokenizers import ByteLevelBPETokenizer
from transformers.utils import logging

import passes
from benchmarks import arms
from benchmarks.arms import dense
from benchmarks.common import (
    alternate,
    chosen,
    held_out,
    load,
    ratio,
    run_parts,
    standing_and_peak,
    step_of,
    summary,
    train_all,
    warmed_cosine,
)
from examples.real import kjv, smollm2, token_rows

CPU = torch.device("cpu")
PERIOD, RANK = 200, 64
SEEDS = (1, 2, 3)
NAME, RUNS = "subspace", "subspace_runs"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A task. batch: rows x tokens. measured: the same, for time and bytes. pilot: steps in which
    a learning rate is chosen. rest: learning rate of what is not a target, or None: frozen."""

    batch: tuple[int, int]
    measured: tuple[int, int]
    steps: int
    pilot: int
    warm_up: int
    rest: float | None
    rates: float  # factor of the learning rates below
    held_out: int  # rows


CASES = {
    "pretraining": Case(
        batch=(4, 64),
        measured=(8, 256),
        steps=1500,
        pilot=200,
        warm_up=100,
        rest=2e-3,
        rates=1.0,
        held_out=96,
    ),
    "finetuning": Case(
        batch=(2, 64),
        measured=(2, 256),
        steps=100,
        pilot=40,
        warm_up=5,
        rest=None,
        rates=0.3,
        held_out=64,
    ),
}


@lru_cache
def start_of(case: str) -> tuple[Any, torch.Tensor]:
    """Return the model to start from and rows of tokens, the same in all processes."""
    logging.set_verbosity_error()
    length = CASES[case].batch[1]
    if case == "finetuning":
        model, tokenizer = smollm2(layers=8)
        return model.train(), token_rows(kjv(), tokenizer, length, 1200)
    text = kjv()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=2048, show_progress=False)
    ids = torch.tensor(tokenizer.encode(text).ids)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    model = transformers.LlamaForCausalLM(config).train()
    return model, ids[: len(ids) // length * length].view(-1, length)


# -- methods ---------------------------------------------------------------------------------------


def ours(model: Any, lr: float, rest: float | None, seed: int, kind: Any, **options: Any) -> Any:
    options = {"rank": RANK, "period": PERIOD} | options
    return arms.ours(model, lr, rest, seed, kind=kind, **options)


lora = partial(arms.lora, rank=RANK)
rso, own_galore = partial(ours, kind=passes.Rso), partial(ours, kind=passes.Galore)
GALORE = {"rank": RANK, "scale": 0.25, "proj_type": "std"}
APOLLO = {"rank": RANK, "scale": 1.0, "proj_type": "std", "proj": "random", "scale_type": "channel"}
galore = partial(dense, kind=partial(GaLoreAdamW, no_deprecation_warning=True), **GALORE)
apollo = partial(dense, kind=APOLLOAdamW, **APOLLO)

METHODS: dict[str, Callable[..., Any]] = {
    "AdamW": partial(dense, kind=torch.optim.AdamW),
    "GaLore (galore-torch)": partial(galore, update_proj_gap=PERIOD),
    "APOLLO (apollo-torch)": partial(apollo, update_proj_gap=PERIOD),
    "LoRA (peft)": lora,
    "LoRA-FA (peft), never redrawn": partial(lora, fixed=True),
    "rso": rso,
    "rso, transport": partial(rso, on_resample="transport"),
    "galore": own_galore,
}
ONCE: dict[str, Callable[..., Any]] = {  # what happens once in a period, in each step
    "GaLore (galore-torch)": partial(galore, update_proj_gap=1),
    "APOLLO (apollo-torch)": partial(apollo, update_proj_gap=1),
    "rso": partial(rso, period=1),
    "rso, transport": partial(rso, period=1, on_resample="transport"),
    "galore": partial(own_galore, period=1),
}
EXACT = [passes.Recompute(), passes.ChunkedLoss()]  # change bytes and time, not the losses
STACKED = {
    "rso + recompute + chunked_loss": partial(rso, also=EXACT),
    "galore + recompute + chunked_loss": partial(own_galore, also=EXACT),
}
RATES = {
    "AdamW": (3e-4, 1e-3),
    "GaLore (galore-torch)": (3e-3, 1e-2),
    "APOLLO (apollo-torch)": (3e-3, 1e-2),
    "galore": (3e-3, 1e-2),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "period 20": {"period": 20},
    "period 600": {"period": 600},
    "rank 16": {"rank": 16},
    "rank 128": {"rank": 128},
    "orthonormal": {"projection": "orthonormal"},
    "a P for each weight": {"share": False},
    "a P for each width": {"share": "width"},
}
METHODS |= {f"rso, {name}": partial(rso, **options) for name, options in VARIANTS.items()}
MAIN = [name for name in METHODS if name.removeprefix("rso, ") not in VARIANTS]


def rates_of(case: str, method: str) -> tuple[float, ...]:
    return tuple(CASES[case].rates * rate for rate in RATES.get(method, (1e-3, 3e-3)))


# -- time and bytes --------------------------------------------------------------------------------


def peak(build: Callable[..., Any], start: Any, case: Case, batches: Sequence[torch.Tensor]) -> int:
    """Return the peak bytes of a step with all that stands: model, optimizer, projections."""
    gc.collect()

    def trained() -> Callable[[], None]:
        model, optimizer = build(copy.deepcopy(start), 1e-5, case.rest, 0)
        step = step_of(model, optimizer, batches)
        for _ in range(3):
            step()
        return step

    return standing_and_peak(trained)[1]


def cost(name: str) -> dict[str, Any]:
    case, (start, rows) = CASES[name], start_of(name)
    count, length = case.measured
    batches = list(rows.reshape(-1)[: 4 * count * length].view(-1, length).split(count))
    builds = {method: METHODS[method] for method in MAIN}
    builds |= STACKED
    shown = list(builds)
    builds |= {f"{method}, each step": build for method, build in ONCE.items()}
    result: dict[str, Any] = {}
    for method in shown:
        torch._dynamo.reset()
        found = peak(builds[method], start, case, batches)
        result[method] = {"peak_megabytes": round(found / 1e6, 1)}
    torch._dynamo.reset()
    steps: dict[str, Callable[[], None]] = {}
    for method, build in builds.items():
        model, optimizer = build(copy.deepcopy(start), 1e-5, case.rest, 0)
        steps[method] = step_of(model, optimizer, batches)
    seconds = alternate(steps, times=15, warm_up=2)
    for method in ONCE:
        # Per round of the alternation, so that the ratios below stay ratios of neighbours.
        each = seconds[f"{method}, each step"]
        plain = seconds[method]
        result[method]["milliseconds_once_in_a_period"] = round(
            1e3 * statistics.median(b - a for a, b in zip(plain, each, strict=True)), 1
        )
        seconds[method] = [a + (b - a) / PERIOD for a, b in zip(plain, each, strict=True)]
    for method in shown:
        result[method] |= {
            "milliseconds": round(1e3 * statistics.median(seconds[method]), 1),
            "time_over_galore": round(ratio(seconds, method, "GaLore (galore-torch)"), 3),
            "time_over_lora": round(ratio(seconds, method, "LoRA (peft)"), 3),
        }
        print(name, method, result[method], flush=True)
    return {"batch": case.measured, "period": PERIOD, "rank": RANK, "methods": result}


# -- quality ---------------------------------------------------------------------------------------


def train(name: str, method: str, lr: float, seed: int, steps: int) -> float:
    """Return the held-out loss after so many steps: warm-up, then a cosine down to a tenth."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    case, (start, rows) = CASES[name], start_of(name)
    test, rows = rows[: case.held_out], rows[case.held_out :]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    model, optimizer = METHODS[method](copy.deepcopy(start), lr, case.rest, seed)
    schedule = warmed_cosine(optimizer, steps, case.warm_up)
    step = step_of(model, optimizer, rows[order].split(case.batch[0]))
    for _ in range(steps):
        step()
        schedule.step()
    return round(held_out(model, test, 16), 4)


def losses_of(name: str, methods: Sequence[str]) -> dict[str, Any]:
    case = CASES[name]
    tried = {m: {lr: (name, m, lr, 0, case.pilot) for lr in rates_of(name, m)} for m in methods}
    pilots, best = chosen(RUNS, train, tried, float)
    found = train_all(
        RUNS, train, [(name, m, best[m], seed, case.steps) for m in methods for seed in SEEDS]
    )
    result: dict[str, Any] = {}
    for m in methods:
        losses = [found[name, m, best[m], seed, case.steps] for seed in SEEDS]
        tries = {str(lr): round(pilots[job], 4) for lr, job in tried[m].items()}
        result[m] = {"lr": best[m], "pilot_losses": tries} | summary(losses)
    setting = {"batch": case.batch, "steps": case.steps, "pilot_steps": case.pilot, "seeds": SEEDS}
    return setting | {"rank": RANK, "period": PERIOD, "methods": result}


def sensitivity(steps: int = 400) -> dict[str, Any]:
    """One option changed at a time, at the learning rate that rso itself had."""
    lr = load(NAME)["parts"]["pretraining, loss"]["methods"]["rso"]["lr"]
    names = ["rso", *(f"rso, {name}" for name in VARIANTS)]
    found = train_all(
        RUNS, train, [("pretraining", m, lr, seed, steps) for m in names for seed in SEEDS]
    )
    rows = {m: summary([found["pretraining", m, lr, s, steps] for s in SEEDS]) for m in names}
    return {"steps": steps, "lr": lr, "seeds": SEEDS, "rows": rows}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "pretraining, cost": lambda: cost("pretraining"),
    "finetuning, cost": lambda: cost("finetuning"),
    "pretraining, loss": lambda: losses_of("pretraining", MAIN),
    "finetuning, loss": lambda: losses_of("finetuning", MAIN),
    "sensitivity": sensitivity,
}


def main(parts: Sequence[str]) -> None:
    """Run the parts whose names contain one of the words given (default: all)."""
    torch._dynamo.config.cache_size_limit = 64
    run_parts(NAME, PARTS, parts)


if __name__ == "__main__":
    main(sys.argv[1:])
