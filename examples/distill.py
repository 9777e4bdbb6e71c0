"""Distill a model into half of its layers in a plain loop, without logits that stand whole.

    python distill.py notes.txt --teacher Qwen/Qwen3-1.7B
    python distill.py notes.txt --teacher Qwen/Qwen3-1.7B --student Qwen/Qwen3-0.6B

The divergence of both is computed in chunks of tokens. For that the frozen teacher has the pass
too, and is called with gradients on, so that its logits are a tensor that knows hidden states and
head, as the student's are; it keeps nothing for backward, since nothing of it is trained. At
Llama-3's vocabulary heads and loss of 4,096 tokens take 0.9 GB instead of 10.5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery


def divergence(teacher: Any, student: Any, ids: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher || student) a token, at a temperature."""
    theirs = teacher(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    ours = student(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    target, input = (log_softmax(z.float() / temperature, -1) for z in (theirs, ours))
    return kl_div(input, target, reduction="batchmean", log_target=True)


def halved(lm: Any) -> Any:
    """Drop the upper half of the layers: where they stand in Llama, Qwen, Mistral and Gemma."""
    lm.config.num_hidden_layers = len(lm.model.layers) // 2
    lm.model.layers = lm.model.layers[: lm.config.num_hidden_layers]
    return lm


def main(
    data: Annotated[Path | None, typer.Argument(help="A text.")] = None,
    teacher: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
    student: Annotated[str, typer.Option(help="Of the same vocabulary; default: halved.")] = "",
    out: Path = Path("out/distill"),
    steps: int = 60,
    batch: int = 2,
    length: int = 128,
    temperature: float = 2.0,
    lr: float = 3e-4,
) -> None:
    """Train the student on the teacher's probabilities, and save it as a plain checkpoint."""
    if data is None:  # in a clone of the repository there is some text
        try:
            from examples.real import sample
        except ImportError:
            raise SystemExit("Which text? python distill.py notes.txt") from None
        data, teacher = sample("text", teacher)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    large: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype=dtype)
    small: Any = AutoModelForCausalLM.from_pretrained(student or teacher, dtype=dtype)
    small = small if student else halved(small)
    for lm in (large, small):
        lm.to(device).train()
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    ids = tokenizer(data.read_text(), return_tensors="pt").input_ids[0].to(device)
    rows = ids.unfold(0, length, length)

    surgery.apply(large.requires_grad_(False), "chunked_loss")
    surgery.apply(small, ["misa", "recompute", "chunked_loss"])
    optimizer = torch.optim.AdamW(small.parameters(), lr=lr)
    torch.manual_seed(0)
    for step in range(1, steps + 1):
        loss = divergence(large, small, rows[torch.randint(len(rows), (batch,))], temperature)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(small.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} of {steps}, divergence {loss.item():.3f}", flush=True)
    small.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
