"""Distillation of SmolLM2 into half of its layers in a plain loop, without logits that stand whole.

python -m examples.distill --steps 60

The teacher is frozen and has the pass too. It is called with gradients on, so that its logits are a
tensor that knows hidden states and head, as the student's are: it keeps nothing for backward, since
nothing of it is trained. The divergence of both is computed in chunks of tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

import surgery
from examples.real import kjv, smollm2, token_rows
from surgery import memory


def divergence(teacher: Any, student: Any, ids: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher || student) a token, at a temperature."""
    theirs = teacher(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    ours = student(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    target, input = (log_softmax(z.float() / temperature, -1) for z in (theirs, ours))
    return kl_div(input, target, reduction="batchmean", log_target=True)


def main(
    layers: Annotated[int, typer.Option(help="Of the teacher; the student has half.")] = 30,
    steps: int = 60,
    batch: int = 2,
    length: int = 128,
    temperature: float = 2.0,
    lr: float = 3e-4,
    out: Path = Path("out"),
) -> None:
    """Train the student on the teacher's probabilities."""
    if layers < 2:
        raise typer.BadParameter("--layers of the teacher must be 2 or more: the student has half.")
    console, (teacher, tokenizer) = Console(), smollm2(layers)
    student, _ = smollm2(layers // 2)
    surgery.apply(teacher.requires_grad_(False).train(), "chunked_loss")
    surgery.apply(student.train(), ["misa", "recompute", "chunked_loss"])
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr)
    rows = token_rows(kjv(), tokenizer, length, 8 + steps * batch)
    test, batches = rows[:8], rows[8:].split(batch)

    def step(ids: Tensor) -> None:
        divergence(teacher, student, ids, temperature).backward()
        optimizer.step()
        optimizer.zero_grad()

    def held_out() -> float:
        with torch.no_grad():
            return float(divergence(teacher, student, test, temperature))

    before = held_out()
    peak = memory.measure(lambda: step(batches[0]), memory.device_of(student)).peak
    for ids in track(batches[1:], description="distillation", console=console):
        step(ids)
    console.print(f"peak of a step {memory.megabytes(peak)} beside weights")
    plain: Any = surgery.remove(student)
    plain.save_pretrained(out)
    console.print(f"held-out loss {before:.3f} -> {held_out():.3f}; plain checkpoint: {out}")


if __name__ == "__main__":
    typer.run(main)
