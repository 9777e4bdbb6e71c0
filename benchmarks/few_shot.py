"""Zeroth-order methods on few-shot classification: accuracy against forwards, at equal forwards.

    python -m benchmarks.few_shot [words of the parts] [--seconds 480]

Prompted (`benchmarks.prompted`), 16 examples of each class, all weights trained. MiniLM on R8 for
400 forwards, for two cores, is what runs by default; SmolLM2 for 20,000, on R8 and 20 Newsgroups,
wants a GPU and a word of its name. Each method has the best of its learning rates (chosen on
another seed, with fewer steps, on the harder task of a model). An evaluation counts as one forward,
a backward as two. One thread to a run. A call begins no run that would end after so many seconds:
call it again.
"""

from __future__ import annotations

import copy
import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import surgery
from benchmarks.common import OutOfTime, chosen, run_parts, train_all
from benchmarks.plots import accuracy
from benchmarks.prompted import GROUPS_WORDS, R8, R8_WORDS, Tokens, start_of

SEEDS, PILOT = (1, 2, 3), 0
SHOTS, TEST, BATCH, MARKS = 16, 240, 8, 4


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is learnt. forwards: of a run; pilot: of one that chooses a learning rate, on `hard`.

    rates: factor of the learning rates below. upper: what is trained by backward in hybrids.
    """

    model: str
    source: str
    classes: tuple[str, ...]
    length: int
    forwards: int
    pilot: int
    rates: float
    upper: str
    hard: str
    lora: tuple[str, ...]


MINILM: dict[str, Any] = dict(
    model="MiniLM",
    source="reuters-r8",
    length=32,
    forwards=400,
    pilot=120,
    rates=1.0,
    upper=r"encoder\.encoder\.layer\.[45]\..*|prompts",  # two of six blocks, and the prompts
    hard="eight classes",
    lora=("query", "key", "value", "dense"),
)
SMOLLM2: dict[str, Any] = dict(
    model="SmolLM2",
    length=64,
    forwards=20_000,
    pilot=2_000,
    rates=0.1,
    upper=r"encoder\.model\.layers\.2[0-9]\..*",  # ten of thirty blocks
    hard="SmolLM2, R8",
    lora=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
TASKS = {
    "two classes": Task(classes=("money-fx", "interest"), **MINILM),
    "eight classes": Task(classes=tuple(R8), **MINILM),
    "SmolLM2, R8": Task(source="reuters-r8", classes=tuple(R8_WORDS), **SMOLLM2),
    "SmolLM2, 20 Newsgroups": Task(source="20newsgroups", classes=tuple(GROUPS_WORDS), **SMOLLM2),
}
SMALL = tuple(name for name, task in TASKS.items() if task.model == "MiniLM")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def balanced(labels: Tensor, each: int, seed: int) -> Tensor:
    """Return places of `each` examples of every class (or all there are), in a random order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    chosen = [order[labels[order] == c][:each] for c in labels.unique()]
    places = torch.cat(chosen)
    return places[torch.randperm(len(places), generator=generator)]


class Both:
    """Two optimizers that step together."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for each in self.optimizers:
            each.step()

    def zero_grad(self) -> None:
        for each in self.optimizers:
            each.zero_grad()


Build = Callable[[Any, Task, float, int], tuple[nn.Module, torch.optim.Optimizer | Both]]


def zeroth(
    model: Any, task: Task, lr: float, seed: int, name: str = "mezo", **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer]:
    surgery.apply(model, name, seed=seed, **options)
    return model, torch.optim.SGD(model.parameters(), lr=lr)


def hybrid(model: Any, task: Task, lr: float, seed: int) -> tuple[nn.Module, Both]:
    surgery.apply(model, "mezo", seed=seed, backward=task.upper)
    slopes = {c.parameter for c in surgery.coordinates(model) if c.parameter.numel() == 1}
    upper = [c.parameter for c in surgery.coordinates(model) if c.parameter not in slopes]
    adamw = torch.optim.AdamW(upper, lr=lr, weight_decay=0.0)
    return model, Both(torch.optim.SGD(slopes, lr=3e-5 * task.rates), adamw)


def upper_alone(
    model: Any, task: Task, lr: float, seed: int
) -> tuple[nn.Module, torch.optim.Optimizer]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.fullmatch(task.upper, name) is not None)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)


def adamw(model: Any, task: Task, lr: float, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    return model, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


def lora(model: Any, task: Task, lr: float, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(task.lora))
    model.encoder = get_peft_model(model.encoder, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)


# method -> how it is built, forwards of a step, learning rates to choose from
METHODS: dict[str, tuple[Build, int, tuple[float, ...]]] = {
    "AdamW": (adamw, 3, (1e-5, 3e-5)),
    "LoRA (peft), AdamW": (lora, 3, (3e-4, 1e-3)),
    "mezo": (zeroth, 2, (1e-5, 3e-5, 1e-4)),
    "mezo, sign": (partial(zeroth, update="sign"), 2, (3e-5, 1e-4, 3e-4)),
    "mezo, conservative": (
        partial(zeroth, update="conservative"), 5, (3e-5, 1e-4, 3e-4),
    ),
    "mezo, 1 block": (partial(zeroth, blocks=1), 2, (3e-5, 1e-4, 3e-4)),
    "mezo, 2 blocks": (partial(zeroth, blocks=2), 2, (3e-5, 1e-4, 3e-4)),
    # three forwards, and a backward through a third of one
    "mezo below, AdamW above": (hybrid, 4, (1e-5, 3e-5, 1e-4)),
    "frozen below, AdamW above": (upper_alone, 2, (1e-5, 3e-5, 1e-4)),  # its control
    "mezo, random mask": (
        partial(zeroth, name="sparse_mezo", mask="random"), 2, (3e-5, 1e-4, 3e-4),
    ),
    "sparse_mezo": (partial(zeroth, name="sparse_mezo"), 2, (3e-5, 1e-4, 3e-4)),
    "lozo": (partial(zeroth, name="lozo"), 2, (1e-5, 3e-5, 1e-4)),
    "subzero": (partial(zeroth, name="subzero"), 2, (1e-5, 3e-5, 1e-4)),
    "mezo, forward gradient": (partial(zeroth, estimate="forward"), 2, (1e-5, 3e-5, 1e-4)),
}  # fmt: skip


@torch.no_grad()
def right(model: nn.Module, tokens: dict[str, Tensor], labels: Tensor) -> float:
    """Return the share of texts put into their class."""
    hits = [
        (model(**{k: v[part] for k, v in tokens.items()}).argmax(-1) == labels[part]).sum().item()
        for part in torch.arange(len(labels)).split(50)
    ]
    return sum(hits) / len(labels)


def on(data: tuple[Tokens, Tensor]) -> tuple[Tokens, Tensor]:
    return {k: v.to(DEVICE) for k, v in data[0].items()}, data[1].to(DEVICE)


def train(task: str, method: str, lr: float, seed: int, forwards: int) -> list[float]:
    """Return the accuracy at the start and at MARKS points on the way, the last at the end."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    own = TASKS[task]
    start, data = start_of(own.model, own.source, own.classes, own.length)
    build, cost, _ = METHODS[method]
    shots = balanced(data["train"][1], SHOTS, seed)
    held = balanced(data["test"][1], TEST // len(own.classes), 1)
    texts, labels = on(data["train"])
    test, truth = on(({k: v[held] for k, v in data["test"][0].items()}, data["test"][1][held]))
    model, optimizer = build(copy.deepcopy(start).to(DEVICE), own, lr, seed)
    model.eval()  # no dropout, as in MeZO
    found, made, mark = [right(model, test, truth)], 0, 1
    turn = 0
    while made < forwards:
        order = shots[torch.randperm(len(shots), generator=torch.Generator().manual_seed(turn))]
        turn += 1
        for part in order.split(BATCH):
            model(**{k: v[part] for k, v in texts.items()}, labels=labels[part]).backward()
            optimizer.step()
            optimizer.zero_grad()
            made += cost
            if made >= mark * forwards / MARKS:
                found.append(right(model, test, truth))
                mark += 1
            if made >= forwards:
                break
    return [round(value, 4) for value in found]


def _rates(rates: Sequence[float], task: Task) -> list[float]:
    return [round(task.rates * lr, 9) for lr in rates]


def compare(name: str, until: float) -> dict[str, Any]:
    task = TASKS[name]
    tried = {
        m: {lr: (task.hard, m, lr, PILOT, task.pilot) for lr in _rates(row[2], task)}
        for m, row in METHODS.items()
    }
    pilots, best = chosen("few_shot_runs", train, tried, lambda run: -max(run[1:]), until)
    runs = train_all(
        "few_shot_runs",
        train,
        [(name, m, best[m], seed, task.forwards) for seed in SEEDS for m in METHODS],
        until,
    )
    rows = {}
    for m, (_, cost, _) in METHODS.items():
        curves = [runs[name, m, best[m], seed, task.forwards] for seed in SEEDS]
        final = [curve[-1] for curve in curves]
        rows[m] = {
            "lr": best[m],
            "pilots": {str(lr): pilots[job] for lr, job in tried[m].items()},
            "forwards_of_a_step": cost,
            "accuracies": final,
            "accuracy_mean": round(statistics.fmean(final), 4),
            "accuracy_deviation": round(statistics.stdev(final), 4),
            "curve": [round(statistics.fmean(at), 4) for at in zip(*curves, strict=True)],
        }
    return {"forwards": task.forwards, "shots": SHOTS, "seeds": SEEDS, "batch": BATCH, "rows": rows}


def main(
    words: Annotated[
        list[str] | None, typer.Argument(help="of the parts; MiniLM's if none")
    ] = None,
    seconds: float = math.inf,
) -> None:
    """Train what is missing of the parts whose names contain one of the words."""
    until = time.time() + seconds
    parts = {name: partial(compare, name, until) for name in TASKS}
    try:
        found = run_parts("few_shot", parts, words or SMALL)
    except OutOfTime as left:
        raise SystemExit(f"{left}: call it again") from None
    for task, result in found.items():
        accuracy(task, result)


if __name__ == "__main__":
    typer.run(main)
