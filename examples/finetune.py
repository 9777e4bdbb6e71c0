"""Full-parameter fine-tuning in a loop of your own, its memory measured beside full AdamW's.

    python -m examples.finetune                                   # SmolLM2-135M on the KJV, MISA
    python -m examples.finetune --pass misa,recompute,chunked_loss --length 512

What surgery needs of a loop is the line that calls surgery.apply. For your model and your text,
with packing, a schedule, checkpoints and an exact resume, there is a loop already: `surgery train`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import passes
import surgery
from examples.real import kjv, smollm2, token_rows
from surgery import memory

HELD_OUT = 8  # rows

console = Console()


def finetune(
    method: Annotated[str, typer.Option("--pass", help="Names, as misa,recompute.")] = "misa",
    steps: int = 60,
    batch: int = 2,
    length: int = 128,
    period: Annotated[int, typer.Option(help="Optimizer steps in a round.")] = 10,
    layers: Annotated[int | None, typer.Option(help="Keep only the first layers.")] = None,
    out: Path = Path("out/finetuned"),
) -> None:
    """Fine-tune, print memory and losses, save a plain checkpoint, load it and let it write."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with console.status("loading SmolLM2-135M-Instruct"):
        lm, tokenizer = smollm2(layers)
        lm.to(device).train()
        rows = token_rows(kjv(), tokenizer, length, steps * batch + HELD_OUT).to(device)
    test, train = rows[:HELD_OUT], rows[HELD_OUT:]
    train = train[torch.randperm(len(train), device=device)]
    first = train[:batch]
    example = {"input_ids": first, "labels": first}

    with console.status("measuring one step of full AdamW"):
        still = torch.optim.AdamW(lm.parameters(), lr=0.0, weight_decay=0.0)
        columns = {"full AdamW": memory.measure_training(lm, example, still)}
        del still

    configured = {
        "misa": passes.Misa(budget=0.03, period=period),
        "lisa": passes.Lisa(period=period),
        "badam": passes.BAdam(period=period),
        "rso": passes.Rso(period=period),
    }
    surgery.apply(lm, [configured.get(name, name) for name in method.split(",")])  # the one line

    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-4, weight_decay=0.0)
    before = evaluate(lm, test)
    with console.status(f"capturing the model, measuring the first step of {method}"):
        columns[method] = memory.measure_training(lm, example, optimizer)

    with _bar() as bar:
        task = bar.add_task("train", total=steps, completed=1, loss=float("nan"), active="")
        for ids in train[batch:].split(batch):
            loss = lm(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            active = sum(c.active for c in surgery.coordinates(lm))
            bar.update(task, advance=1, loss=loss.item(), active=f"{active} active modules")
    after = evaluate(lm, test)

    console.print(surgery.report(lm))
    console.print(memory.table(columns, f"memory of one step, {batch} x {length} tokens, measured"))
    console.print(f"held-out loss {before:.3f} -> {after:.3f}")

    out.mkdir(parents=True, exist_ok=True)
    lm.save_pretrained(out)
    tokenizer.save_pretrained(out)
    written: Any = AutoModelForCausalLM.from_pretrained(out)
    prompt = tokenizer("And God said", return_tensors="pt")
    sentence = written.generate(**prompt, max_new_tokens=24, do_sample=False)
    console.print(f"a plain checkpoint in {out}, loaded again, writes:")
    console.print(f"  [italic]{tokenizer.decode(sentence[0], skip_special_tokens=True)}[/italic]")
    if not after < before:
        raise SystemExit("the held-out loss did not fall")


@torch.no_grad()
def evaluate(lm: Any, rows: torch.Tensor) -> float:
    lm.eval()
    losses = [lm(input_ids=row[None], labels=row[None]).loss.item() for row in rows]
    lm.train()
    return sum(losses) / len(losses)


def _bar() -> Progress:
    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[active]}"),
        TimeRemainingColumn(),
        console=console,
    )


if __name__ == "__main__":
    typer.run(finetune)
