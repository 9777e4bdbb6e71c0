"""What becomes of RSO's steps in weights of few bits: carried as they are made, or folded once.

    python -m benchmarks.folding

SmolLM2 (8 blocks) is trained in float32 for one round; the steps of B of some of its matrices are
then replayed on the same matrices in bfloat16, and folded into quantised ones. The figure is the
relative error of the change, |W_end - W_start - B P| / |B P|.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes import functional as bits  # pyright: ignore[reportMissingImports] # see `bench`
from torch import Tensor
from transformers.utils import logging

import passes
import surgery
from benchmarks.common import save
from examples.real import kjv, smollm2, token_rows
from surgery.engine.finding import surgery_of
from surgery.weights.carry import carry
from surgery.weights.coordinate import Coordinate, Mapped

STEPS, RATES = 100, (1e-4, 1e-3)
WATCHED = ("layers.1.self_attn.q_proj", "layers.4.mlp.up_proj", "layers.6.mlp.down_proj")
Replay = Callable[
    [Tensor, Coordinate, list[Tensor]], Tensor
]  # W, its coordinate, steps of B -> change


def at_random(weight: Tensor, each: Coordinate, steps: list[Tensor]) -> Tensor:
    now = weight.clone()
    # A start that is not zero would be told from the weight: each step by itself, as with decay.
    for number, step in enumerate(steps):
        rule_of(each).since = number
        carry(each, now, torch.zeros_like(step), step, number)
    return now.float() - weight.float()


def as_rso_does(weight: Tensor, each: Coordinate, steps: list[Tensor]) -> Tensor:
    now, old = weight.clone(), torch.zeros_like(steps[0])
    rule_of(each).since = 0
    for step in steps:
        carry(each, now, old, old + step, 0)
        old = old + step
    return now.float() - weight.float()


def to_nearest(weight: Tensor, each: Coordinate, steps: list[Tensor]) -> Tensor:
    now = weight.clone()
    for step in steps:
        now = (now.float() + expanded(each, step)).to(now.dtype)
    return now.float() - weight.float()


def once(weight: Tensor, each: Coordinate, steps: list[Tensor]) -> Tensor:
    now = (weight.float() + expanded(each, total(steps))).to(weight.dtype)
    return now.float() - weight.float()


def once_nf4(weight: Tensor, each: Coordinate, steps: list[Tensor]) -> Tensor:
    start = bits.dequantize_4bit(*bits.quantize_4bit(weight.float(), quant_type="nf4"))
    now = start + expanded(each, total(steps))
    return bits.dequantize_4bit(*bits.quantize_4bit(now, quant_type="nf4")) - start


def once_int8(weight: Tensor, each: Coordinate, steps: list[Tensor]) -> Tensor:
    start = rows_int8(weight.float())
    return rows_int8(start + expanded(each, total(steps))) - start


def rows_int8(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


def total(steps: list[Tensor]) -> Tensor:
    return torch.stack(steps).double().sum(0).float()


def expanded(each: Coordinate, step: Tensor) -> Tensor:
    return rule_of(each).map.expand(step)


def rule_of(each: Coordinate) -> Mapped:
    assert each.mapped is not None
    return each.mapped


REPLAYS: dict[str, Replay] = {
    "bfloat16, carried in each step, the round's sum rounded once at random": as_rso_does,
    "bfloat16, carried in each step, each rounded at random": at_random,
    "bfloat16, carried in each step, each rounded to nearest": to_nearest,
    "bfloat16, folded once": once,
    "int8 a row, folded once": once_int8,
    "nf4 (bitsandbytes), folded once": once_nf4,
}


def record(lr: float) -> list[tuple[Tensor, Coordinate, list[Tensor]]]:
    """Train for a round, and return what was watched: W in bfloat16, its coordinate, its steps."""
    torch._dynamo.reset()
    model, tokenizer = smollm2(layers=8)
    rows = token_rows(kjv(), tokenizer, 64, 2 * STEPS)
    starts = {name: p.detach().bfloat16() for name, p in model.named_parameters()}
    surgery.apply(model.train(), passes.Rso(rank=64, period=10 * STEPS))
    state = surgery_of(model)
    assert state is not None
    watched = [p for p in state.decision.coordinates if any(name in p.weight for name in WATCHED)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    seen: dict[str, list[Tensor]] = {p.weight: [] for p in watched}
    for ids in rows.split(2):
        before = [p.parameter.detach().clone() for p in watched]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for each, old in zip(watched, before, strict=True):
            seen[each.weight].append(each.parameter.detach() - old)
    return [(starts[p.weight], p, seen[p.weight]) for p in watched]


def main() -> None:
    logging.set_verbosity_error()
    result: dict[str, Any] = {}
    for lr in RATES:
        recorded = record(lr)
        for name, replay in REPLAYS.items():
            errors = []
            for weight, each, steps in recorded:
                exact = expanded(each, total(steps))
                errors.append(((replay(weight, each, steps) - exact).norm() / exact.norm()).item())
            result.setdefault(name, {})[str(lr)] = round(statistics.fmean(errors), 4)
            print(name, lr, result[name][str(lr)], flush=True)
    save("folding", {"steps": STEPS, "weights": WATCHED, "relative_error_of_the_change": result})


if __name__ == "__main__":
    main()
