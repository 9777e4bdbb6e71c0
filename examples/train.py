"""Fine-tune a language model on text of your own, in a plain loop.

    python train.py notes.txt --model Qwen/Qwen3-0.6B --steps 500
    python train.py docs.jsonl --length 2048 --batch 8     # a line is {"text": "..."}

`surgery.apply` is the only line of surgery: gradients and Adam's state exist for a share of the
weights at a time, and logits and cheap activations are computed twice instead of being kept. On a
GPU it trains in bfloat16. What a model needs is predicted by `surgery plan`, without a GPU.
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

import passes
import surgery


def main(
    data: Annotated[Path | None, typer.Argument()] = None,  # text, or .jsonl
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct",  # an id of the hub, or a folder
    out: Path = Path("out/train"),  # where the checkpoint goes, at the end
    budget: float = 0.05,  # the share of all weights that is trained at a time
    steps: int = 60,
    batch: int = 4,  # rows in a step
    length: int = 256,  # tokens in a row
    lr: float = 3e-4,  # at its highest
    warmup: float = 0.1,  # the share of steps in which the rate rises; then it falls as a cosine
) -> None:
    """Train, and save a checkpoint that plain transformers loads."""
    if data is None:  # in a clone of the repository there is some text
        try:
            from examples.real import sample
        except ImportError:
            raise SystemExit("Which text? python train.py notes.txt, or docs.jsonl") from None
        data, model = sample("text", model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    lm: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    lm.to(device).train()
    tokenizer = AutoTokenizer.from_pretrained(model)
    # Documents are packed: one after another, each with an end, and cut into rows without padding.
    texts = [data.read_text()]
    if data.suffix == ".jsonl":
        texts = [json.loads(line).get("text") for line in texts[0].splitlines() if line]
    if None in texts:
        raise SystemExit(f'{data} has lines without "text"; one is {{"text": "..."}}')
    ids = [i for text in texts for i in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    if not len(rows):
        raise SystemExit(f"{data} has {len(ids)} tokens, fewer than a row: --length {len(ids)}")

    surgery.apply(lm, [passes.Misa(budget=budget), passes.Recompute(), passes.ChunkedLoss()])
    optimizer = torch.optim.AdamW(lm.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps + 1, pct_start=warmup, cycle_momentum=False
    )
    torch.manual_seed(0)
    for step in range(1, steps + 1):
        began = time.perf_counter()
        inputs = rows[torch.randint(len(rows), (batch,))].to(device)
        loss = lm(input_ids=inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        speed = inputs.numel() / (time.perf_counter() - began)
        print(f"step {step} of {steps}, loss {loss.item():.3f}, {speed:,.0f} tokens/s", flush=True)
    lm.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
