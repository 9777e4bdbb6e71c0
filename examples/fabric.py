"""Fine-tune SmolLM2 in a plain loop under Lightning Fabric.

python -m examples.fabric --pass rso --steps 40
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from lightning_fabric import Fabric
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
    out: Path = Path("out/fabric"),
) -> None:
    """Train, and export a plain checkpoint."""
    logging.set_verbosity_error()
    fabric = Fabric(devices=1)
    model: Any
    model, tokenizer = smollm2(layers)
    rows = token_rows(kjv(), tokenizer, length, 2 * steps + 8)
    surgery.apply(model, method)
    trained = [p for p in model.parameters() if p.requires_grad]
    wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(trained, lr=3e-4))
    test = rows[:8].to(fabric.device)
    before = evaluate(model, test)
    for ids in track(rows[8:].to(fabric.device).split(2)):
        fabric.backward(wrapped(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    after = evaluate(model, test)
    surgery.export(model, out)
    print(f"held-out loss {before:.4f} -> {after:.4f}; plain checkpoint: {out}")


if __name__ == "__main__":
    typer.run(train)
