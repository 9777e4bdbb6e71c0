"""Stop a run at any step and go on in another process, to the bit.

    python resume.py notes.txt --out whole             # does not stop
    python resume.py notes.txt --out parts --stop 7    # saves after 7 steps, and ends
    python resume.py notes.txt --out parts             # goes on with step 8

Both print the same losses and end with the same checksum of all weights. A save holds the weights
and Adam's state of what is being trained. What else a step depends on, rows and dropout, the loop
draws from the number of the step.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

import passes
import surgery


def main(
    data: Annotated[Path | None, typer.Argument(help="A text.")] = None,
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
    out: Path = Path("out/resume"),
    stop: Annotated[int | None, typer.Option(help="End after this step.")] = None,
    steps: int = 12,
    batch: int = 2,
    length: int = 64,
    lr: float = 3e-4,
) -> None:
    """Train from the last save on, if there is one."""
    if data is None:  # in a clone of the repository there is some text
        try:
            from examples.real import sample
        except ImportError:
            raise SystemExit("Which text? python resume.py notes.txt") from None
        data, model = sample("text", model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    lm: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    lm.to(device).train()
    ids = AutoTokenizer.from_pretrained(model)(data.read_text(), return_tensors="pt").input_ids[0]
    rows = ids.unfold(0, length, length)

    run = out / "run"
    begun = run.exists()
    new = [passes.Misa(budget=0.05, period=5), passes.Recompute(), passes.ChunkedLoss()]
    surgery.apply(lm, surgery.saved_passes(run) if begun else new)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if begun:
        surgery.load(lm, run, optimizer, schedule)
    for step in range(schedule.last_epoch, min(stop or steps, steps)):
        torch.manual_seed(step)
        inputs = rows[torch.randint(len(rows), (batch,))].to(device)
        loss = lm(input_ids=inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        print(f"step {step + 1} of {steps}, loss {loss.item()}", flush=True)
    surgery.save(lm, run, optimizer, schedule)  # here at the end; at any optimizer step in yours

    digest = hashlib.sha256()
    for weight in lm.state_dict().values():
        digest.update(weight.cpu().view(torch.uint8).numpy())
    print(f"after step {schedule.last_epoch} the weights have the checksum {digest.hexdigest()}")


if __name__ == "__main__":
    typer.run(main)
