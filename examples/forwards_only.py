"""Fine-tune SmolLM2 on the King James Bible with forwards alone: no backward, memory of inference.

python -m examples.forwards_only --pass lozo --steps 200
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file

import surgery
from examples.finetune import evaluate
from examples.real import kjv, smollm2, token_rows
from surgery import memory


def train(
    method: Annotated[
        str, typer.Option("--pass", help="mezo, sparse_mezo, lozo, subzero.")
    ] = "mezo",
    layers: Annotated[int | None, typer.Option(help="Use the first layers only.")] = None,
    steps: int = 60,
    directions: Annotated[int, typer.Option(help="Probed in each step, two forwards each.")] = 4,
    batch: int = 4,
    length: int = 64,
    lr: float = 1e-5,
    out: Annotated[Path, typer.Option(help="The journal of the run is written here.")] = Path(
        "out"
    ),
) -> None:
    """Train, and write the run as a list of scalars."""
    console = Console()
    model: Any
    model, tokenizer = smollm2(layers)
    rows = token_rows(kjv(), tokenizer, length, batch * 20 + 8)
    test, batches = rows[:8], rows[8:].split(batch)
    before = evaluate(model, test)
    surgery.apply(model.train(), method, directions=directions)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)

    def step(ids: torch.Tensor) -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(batches[0])
    peak = memory.measure(lambda: step(batches[1]), memory.device_of(model)).peak
    for turn in track(range(2, steps), description=method, console=console):
        step(batches[turn % len(batches)])
    after = evaluate(model, test)
    console.print(surgery.report(model))
    weights = memory.storage_bytes(model.parameters())
    console.print(
        f"weights {memory.megabytes(weights)}, peak of a step {memory.megabytes(peak)} more"
    )
    console.print(f"held-out loss {before:.3f} -> {after:.3f}")
    out.mkdir(parents=True, exist_ok=True)
    partial, target = out / "journal.tmp", out / "journal.safetensors"
    save_file({"journal": surgery.journal(model)}, partial)
    partial.replace(target)
    console.print(f"the run, to replay: {target}, {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    typer.run(train)
