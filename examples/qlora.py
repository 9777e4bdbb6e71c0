"""QLoRA with less memory: LoRA over a base of four bits, its logits and activations not kept.

    python qlora.py notes.txt --model Qwen/Qwen3-8B --length 2048
    python qlora.py notes.txt --model Qwen/Qwen3-8B --velora   # keeps less still; approximate

The passes are exact: the run is the one without them. bitsandbytes holds the base, peft the
adapters (pip install bitsandbytes peft). Llama-3-8B takes 14 GiB for a row of 2,048 tokens, 27
without the passes (predicted). It runs on a CPU as well, where bitsandbytes does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import surgery


def main(
    data: Annotated[Path | None, typer.Argument(help="A text.")] = None,
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
    out: Path = Path("out/qlora"),
    velora: Annotated[bool, typer.Option(help="Train A by a projection of its gradient.")] = False,
    rank: int = 16,
    steps: int = 20,
    batch: int = 2,
    length: int = 256,
    lr: float = 5e-4,
) -> None:
    """Train adapters, and save them as PEFT does."""
    if data is None:  # in a clone of the repository there is some text
        try:
            from examples.real import sample
        except ImportError:
            raise SystemExit("Which text? python qlora.py notes.txt") from None
        data, model = sample("text", model)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    base = AutoModelForCausalLM.from_pretrained(model, quantization_config=bits, dtype=dtype)
    adapters = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    lm: Any = get_peft_model(base, adapters).train()

    exact = ["recompute", "chunked_loss"]
    surgery.apply(lm, ["velora", *exact] if velora else exact)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=lr)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(data.read_text(), return_tensors="pt").input_ids[0].to(lm.device)
    rows = ids.unfold(0, length, length)
    torch.manual_seed(0)
    for step in range(1, steps + 1):
        inputs = rows[torch.randint(len(rows), (batch,))]
        loss = lm(input_ids=inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} of {steps}, loss {loss.item():.3f}", flush=True)

    lm.save_pretrained(out)  # the adapters alone
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
