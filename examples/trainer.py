"""The HF Trainer as it is: stopped in the middle, it goes on from its own checkpoint.

    python -m examples.trainer --pass rso

What surgery adds to a Trainer script is one line before it and, for resuming, one callback.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import surgery
from examples.real import HUB, sample, token_rows


def main(
    method: Annotated[str, typer.Option("--pass", help="Name of a pass.")] = "misa",
    model: str = HUB,
    steps: int = 40,
    length: int = 64,
    out: Path = Path("out/trainer"),
) -> None:
    """Train, then train the second half again from the checkpoint in the middle."""
    file, model = sample("text", model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = token_rows(file.read_text(), tokenizer, length, 4 * steps + 8)
    data: Any = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=3e-4,
        save_steps=steps // 2,
        logging_steps=max(1, steps // 10),
        report_to=[],
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )

    def trainer() -> Trainer:
        lm = surgery.apply(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), method)
        return Trainer(
            model=lm,
            args=arguments,
            train_dataset=data[8:],
            eval_dataset=data[:8],
            callbacks=[surgery.TrainerCallback()],
        )

    whole, resumed = trainer(), trainer()
    before = whole.evaluate()["eval_loss"]
    whole.train()
    resumed.train(resume_from_checkpoint=str(out / f"checkpoint-{steps // 2}"))
    after, again = (each.evaluate()["eval_loss"] for each in (whole, resumed))
    print(f"held-out loss {before:.4f} -> {after:.4f}, resumed from the middle {again:.4f}")


if __name__ == "__main__":
    typer.run(main)
