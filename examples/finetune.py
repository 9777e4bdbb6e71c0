"""The main job: fine-tune SmolLM2-135M by MISA, its memory measured beside full AdamW's.

    make demo                                # or: python -m examples.finetune, 5 minutes on 2 cores
    python -m examples.finetune --pass misa,recompute,chunked_loss --length 512

It measures one step of each, trains in a plain loop, and lets the checkpoint that it saves write a
sentence. For text of your own: examples/train.py, or `surgery train`, which needs no script.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import passes
import surgery
from examples.real import HUB, held_out, sample, token_rows
from surgery import memory

console = Console()
BAR = [
    TextColumn("step"),
    MofNCompleteColumn(),
    BarColumn(),
    TextColumn("loss {task.fields[loss]:.3f}"),
    TextColumn("{task.fields[active]} active modules"),
    TimeRemainingColumn(),
]


def main(
    method: Annotated[str, typer.Option("--pass", help="Names, as misa,recompute.")] = "misa",
    model: Annotated[str, typer.Option(help="An id of the hub, or a folder.")] = HUB,
    steps: int = 60,
    batch: int = 2,
    length: int = 128,
    period: Annotated[int, typer.Option(help="Steps until misa trains other weights.")] = 10,
    out: Path = Path("out/finetuned"),
) -> None:
    """Print memory and losses, save a plain checkpoint, load it and let it write."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with console.status("loading the model and the King James Bible"):
        data, model = sample("text", model)
        lm: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        lm.to(device).train()
        tokenizer = AutoTokenizer.from_pretrained(model)
        rows = token_rows(data.read_text(), tokenizer, length, steps * batch + 8).to(device)
    test, train = rows[:8], rows[8:][torch.randperm(steps * batch)]
    ids = train[:batch]
    first = {"input_ids": ids, "labels": ids}

    with console.status("measuring one step of full AdamW"):
        still = torch.optim.AdamW(lm.parameters(), lr=0.0, weight_decay=0.0)
        columns = {"full AdamW": memory.measure_training(lm, first, still)}
        del still

    misa = passes.Misa(budget=0.03, period=period)
    surgery.apply(lm, [misa if name == "misa" else name for name in method.split(",")])

    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-4, weight_decay=0.0)
    before = held_out(lm, test)
    with console.status(f"capturing the model, measuring the first step of {method}"):
        columns[method] = memory.measure_training(lm, first, optimizer)
    with Progress(*BAR, console=console) as bar:
        task = bar.add_task("train", total=steps, completed=1, loss=float("nan"), active="")
        for ids in train[batch:].split(batch):
            loss = lm(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            active = sum(c.active for c in surgery.coordinates(lm))
            bar.update(task, advance=1, loss=loss.item(), active=active)
    after = held_out(lm, test)

    console.print(surgery.report(lm))
    console.print(memory.table(columns, f"memory of one step, {batch} x {length} tokens, measured"))
    console.print(f"held-out loss {before:.3f} -> {after:.3f}")
    lm.save_pretrained(out)
    tokenizer.save_pretrained(out)
    plain: Any = AutoModelForCausalLM.from_pretrained(out)
    prompt = tokenizer("And God said", return_tensors="pt")
    told = plain.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    console.print(f"a plain checkpoint in {out}, loaded again, writes:")
    console.print(tokenizer.decode(told, skip_special_tokens=True), style="italic", markup=False)
    if not after < before:
        raise SystemExit("the held-out loss did not fall")


if __name__ == "__main__":
    typer.run(main)
