"""Direct preference optimization of SmolLM2 in a plain loop, without logits that stand whole.

python -m examples.dpo --steps 60

Preferred are verses of the King James Bible over the same verses with their words out of order. The
logits that leave the model are a tensor that knows hidden states and head: log_softmax and gather
compute them in chunks. The reference model's log-probabilities are computed once.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

import surgery
from examples.real import kjv, smollm2
from surgery import memory


def pairs(tokenizer: Any, count: int, length: int) -> Tensor:
    """Return token ids (count, 2, length): a verse as it is, and with its words shuffled."""
    shuffle, lines = random.Random(0).shuffle, (line.split() for line in kjv().splitlines())
    found = []
    for words in (words for words in lines if len(words) >= length):
        mixed = words.copy()
        shuffle(mixed)
        both = [tokenizer(" ".join(each))["input_ids"][:length] for each in (words, mixed)]
        found.append(both)
        if len(found) == count:
            break
    return torch.tensor(found)


def log_probability(model: Any, ids: Tensor) -> Tensor:
    """Return the log-probability (n, 2) of each text of pairs (n, 2, length)."""
    flat = ids.flatten(0, 1)
    logits = model(input_ids=flat, use_cache=False).logits[:, :-1]
    each = log_softmax(logits.float(), -1).gather(-1, flat[:, 1:, None])
    return each.sum((1, 2)).view(-1, 2)


def main(
    layers: Annotated[int | None, typer.Option(help="Use the first layers only.")] = None,
    steps: int = 60,
    batch: int = 2,
    length: int = 48,
    beta: float = 0.1,
    lr: float = 3e-5,
    out: Path = Path("out"),
) -> None:
    """Train, and say how often the verse is preferred before and after."""
    console, (model, tokenizer) = Console(), smollm2(layers)
    data = pairs(tokenizer, 32 + steps * batch, length)
    with torch.no_grad():
        reference = torch.cat([log_probability(model, part) for part in data.split(8)])
    surgery.apply(model.train(), ["misa", "recompute", "chunked_loss"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

    def margin(place: slice) -> Tensor:
        chosen, rejected = (log_probability(model, data[place]) - reference[place]).unbind(1)
        return beta * (chosen - rejected)

    def step(turn: int) -> None:
        start = 32 + turn * batch
        logsigmoid(margin(slice(start, start + batch))).mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()

    def held_out() -> float:
        with torch.no_grad():
            return float(-logsigmoid(margin(slice(0, 32))).mean())

    before = held_out()
    peak = memory.measure(lambda: step(0), memory.device_of(model)).peak
    for turn in track(range(1, steps), description="DPO", console=console):
        step(turn)
    console.print(f"peak of a step {memory.megabytes(peak)} beside weights")
    plain: Any = surgery.remove(model)
    plain.save_pretrained(out)
    console.print(f"held-out loss {before:.3f} -> {held_out():.3f}; plain checkpoint: {out}")


if __name__ == "__main__":
    typer.run(main)
