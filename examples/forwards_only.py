"""Training by forward passes alone: no backward pass, the memory of inference.

    python -m examples.forwards_only --pass lozo --steps 200

The loop is the usual one: `backward` fills in a gradient that two forward passes have found along
each of a few random directions. The run is a list of scalars, a *journal* of some hundred bytes,
from which `surgery.replay` makes the weights again. It needs thousands of steps to get far.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery
from examples.real import HUB, held_out, sample, token_rows
from surgery import memory


def main(
    method: Annotated[
        str, typer.Option("--pass", help="mezo, sparse_mezo, lozo, subzero.")
    ] = "mezo",
    model: str = HUB,
    steps: int = 60,
    directions: Annotated[int, typer.Option(help="In each step, two forward passes each.")] = 4,
    batch: int = 4,
    length: int = 64,
    lr: float = 1e-5,
    out: Path = Path("out/forwards"),
) -> None:
    """Train, and write the run as a list of scalars."""
    console, (data, model) = Console(), sample("text", model)
    lm: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = token_rows(data.read_text(), tokenizer, length, batch * 20 + 8)
    test, batches = rows[:8], rows[8:].split(batch)
    before = held_out(lm, test)
    surgery.apply(lm, method, directions=directions)
    optimizer = torch.optim.SGD(lm.parameters(), lr=lr)

    def step(ids: torch.Tensor) -> None:
        lm(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(batches[0])
    peak = memory.measure(lambda: step(batches[1]), memory.device_of(lm)).peak
    for turn in track(range(2, steps), description=method, console=console):
        step(batches[turn % len(batches)])
    weights = memory.storage_bytes(lm.parameters())
    console.print(f"weights {memory.megabytes(weights)}, a step {memory.megabytes(peak)} more")
    console.print(f"held-out loss {before:.3f} -> {held_out(lm, test):.3f}")
    out.mkdir(parents=True, exist_ok=True)
    journal = surgery.journal(lm)
    save_file({"journal": journal}, out / "journal.safetensors")
    console.print(f"the run, to replay: {out / 'journal.safetensors'}, {journal.numel()} numbers")


if __name__ == "__main__":
    typer.run(main)
