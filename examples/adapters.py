"""LoRA and a part of the base at once: PEFT adapters, MISA on the base, exported for plain PEFT.

python -m examples.adapters --steps 30
python -m examples.adapters --steps 30 --rho 0.05  # Flat-LoRA's noise under the adapters
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import track
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import passes
import surgery
from examples.finetune import evaluate
from examples.real import kjv, smollm2, token_rows


def train(
    layers: Annotated[int | None, typer.Option(help="Use the first layers only.")] = None,
    steps: int = 30,
    length: int = 64,
    rho: Annotated[float, typer.Option(help="Noise of Flat-LoRA, 0 for none.")] = 0.0,
    out: Path = Path("out/adapters"),
) -> None:
    """Train, export base and adapters, load both again and compare."""
    logging.set_verbosity_error()
    model: Any
    model, tokenizer = smollm2(layers)
    rows = token_rows(kjv(), tokenizer, length, 2 * steps + 8)
    test, batches = rows[:8], rows[8:].split(2)
    before = evaluate(model, test)
    config = LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = get_peft_model(model, config).train()
    for name, parameter in model.named_parameters():
        if "mlp" in name:  # PEFT froze the base; these are to be trained
            parameter.requires_grad_(True)
    base = passes.Misa(budget=0.03, period=10, targets=r".*mlp.*_proj", always=".*lora_.*")
    flat = [passes.FlatLora(rho=rho, steps=steps)] if rho else []
    surgery.apply(model, [base, *flat, passes.Recompute(), passes.ChunkedLoss()])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)
    for ids in track(batches[:steps]):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = evaluate(model, test)
    surgery.export(model, out)
    plain = AutoModelForCausalLM.from_pretrained(out)
    loaded = evaluate(PeftModel.from_pretrained(plain, out / "adapters"), test)
    print(f"held-out loss {before:.4f} -> {after:.4f}, exported and loaded {loaded:.4f}")
    if abs(loaded - after) > 1e-4:
        raise SystemExit("the export is another model")


if __name__ == "__main__":
    typer.run(train)
