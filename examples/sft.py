"""Fine-tune SmolLM2 with TRL's SFTTrainer, which puts a forward of its own into the model first.

    python -m examples.sft --pass misa --steps 40

Surgery comes after the trainer has been built; that is all there is to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage] # lazy

import surgery
from examples.real import kjv, smollm2, token_rows


def train(
    method: Annotated[str, typer.Option("--pass", help="Name of a pass.")] = "misa",
    layers: Annotated[int | None, typer.Option(help="Use the first layers only.")] = None,
    steps: int = 40,
    length: int = 64,
    out: Path = Path("out/sft"),
) -> None:
    """Train, and export a plain checkpoint."""
    logging.set_verbosity_error()
    model: Any
    model, tokenizer = smollm2(layers)
    rows = [
        {"input_ids": row.tolist()} for row in token_rows(kjv(), tokenizer, length, 2 * steps + 8)
    ]
    arguments = SFTConfig(
        output_dir=str(out / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=3e-4,
        max_length=None,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to=[],
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
    )
    trainer: Any = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows[8:]),
        eval_dataset=Dataset.from_list(rows[:8]),
        processing_class=tokenizer,
    )
    surgery.apply(trainer.model, method)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    surgery.export(trainer.model, out / "model")
    print(f"held-out loss {before:.4f} -> {after:.4f}; plain checkpoint: {out / 'model'}")


if __name__ == "__main__":
    typer.run(train)
