"""Ask what fits into the memory there is, turn that on, and train a few steps.

    python fit.py notes.txt --model Qwen/Qwen3-0.6B --memory 8GiB --length 2048

`surgery.fit` plays a training step of each sensible combination of passes on tensors without
memory, exact ones first, and recommends the first that leaves a tenth free. It needs no GPU, and
takes one to some minutes, whatever the size of the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery


def main(
    data: Annotated[Path | None, typer.Argument(help="A text.")] = None,
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
    memory: Annotated[str, typer.Option(help="As 24GiB; default: the GPU's, or 2GiB.")] = "",
    steps: int = 4,
    batch: int = 1,
    length: int = 256,
    lr: float = 3e-4,
) -> None:
    """Print the table, train, and print what was predicted beside what is measured."""
    if data is None:  # in a clone of the repository there is some text
        try:
            from examples.real import sample
        except ImportError:
            raise SystemExit("Which text? python fit.py notes.txt") from None
        data, model = sample("text", model)
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    lm: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).train()
    lm.config.use_cache = False  # in training the cache only takes memory

    there = torch.cuda.mem_get_info()[1] if cuda else "2GiB"
    print("Playing one step of each combination of passes: a minute, or some.", flush=True)
    found = surgery.fit(lm, (batch, length), memory or there)
    print(found)
    found.apply(lm.to("cuda" if cuda else "cpu"))  # checkpointing too, if that is recommended

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(data.read_text(), return_tensors="pt").input_ids[0].to(lm.device)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=lr)
    for step, rows in enumerate(ids.unfold(0, length, length).split(batch)[:steps], 1):
        loss = lm(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    if found.best is not None and found.best.spec:
        print(surgery.report(lm, {"input_ids": rows, "labels": rows}))


if __name__ == "__main__":
    typer.run(main)
