"""Fine-tune SmolLM2 with the plain HF Trainer, stop, and go on from its checkpoint.

    python -m examples.trainer --pass rso --steps 40

What surgery adds to a Trainer script is one line before it and, for resuming, one callback.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

import surgery
from examples.real import kjv, smollm2, token_rows


def trainer_of(method: str, layers: int | None, steps: int, length: int, out: Path) -> Trainer:
    """Return a Trainer on a model that trains by the method, as any script would build it."""
    model: Any
    model, tokenizer = smollm2(layers)
    rows = token_rows(kjv(), tokenizer, length, 4 * steps + 8)
    data: Any = [{"input_ids": row, "labels": row} for row in rows]
    surgery.apply(model, method)
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=3e-4,
        save_steps=steps // 2,
        logging_steps=max(1, steps // 10),
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=data[8:],
        eval_dataset=data[:8],
        callbacks=[surgery.TrainerCallback()],
    )


def train(
    method: Annotated[str, typer.Option("--pass", help="Name of a pass.")] = "misa",
    layers: Annotated[int | None, typer.Option(help="Use the first layers only.")] = None,
    steps: int = 40,
    length: int = 64,
    out: Path = Path("out/trainer"),
) -> None:
    """Train, then train the second half again from the checkpoint in the middle."""
    logging.set_verbosity_error()
    whole = trainer_of(method, layers, steps, length, out)
    before = whole.evaluate()["eval_loss"]
    whole.train()
    after = whole.evaluate()["eval_loss"]
    again = trainer_of(method, layers, steps, length, out)
    again.train(resume_from_checkpoint=str(out / f"checkpoint-{steps // 2}"))
    resumed = again.evaluate()["eval_loss"]
    print(f"held-out loss {before:.4f} -> {after:.4f}, resumed from the middle {resumed:.4f}")
    if resumed != after:
        raise SystemExit("the resumed run is another one")


if __name__ == "__main__":
    typer.run(train)
