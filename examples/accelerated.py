"""Fine-tune SmolLM2 in a plain loop under Accelerate, with gradient accumulation.

python -m examples.accelerated --pass rso --steps 40
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from rich.progress import track
from transformers.utils import logging

import surgery
from examples.finetune import evaluate
from examples.real import kjv, smollm2, token_rows


def train(
    method: Annotated[str, typer.Option("--pass", help="Name of a pass.")] = "misa",
    layers: Annotated[int | None, typer.Option(help="Use the first layers only.")] = None,
    steps: int = 40,
    length: int = 64,
    out: Path = Path("out/accelerated"),
) -> None:
    """Train, and export a plain checkpoint."""
    logging.set_verbosity_error()
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model: Any
    model, tokenizer = smollm2(layers)
    rows = token_rows(kjv(), tokenizer, length, 2 * steps + 8)
    surgery.apply(model, method)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    model, optimizer = accelerator.prepare(model, optimizer)
    rows = rows.to(accelerator.device)
    before = evaluate(model, rows[:8])
    for ids in track(rows[8:].split(1)):
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    after = evaluate(model, rows[:8])
    surgery.export(accelerator.unwrap_model(model), out)
    print(f"held-out loss {before:.4f} -> {after:.4f}; plain checkpoint: {out}")


if __name__ == "__main__":
    typer.run(train)
