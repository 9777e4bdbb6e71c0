"""LoRA and a part of the base at once: adapters by PEFT, the base's MLPs by MISA.

    python -m examples.adapters
    python -m examples.adapters --rho 0.05  # with Flat-LoRA's noise under the adapters

Base and adapters are exported apart, as plain PEFT loads them, and both are loaded again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import passes
import surgery
from examples.real import HUB, held_out, sample, token_rows


def main(
    model: str = HUB,
    steps: int = 30,
    length: int = 64,
    rho: Annotated[float, typer.Option(help="Noise of Flat-LoRA, 0 for none.")] = 0.0,
    out: Path = Path("out/adapters"),
) -> None:
    """Train, export base and adapters, load both again and compare."""
    data, model = sample("text", model)
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = token_rows(data.read_text(), tokenizer, length, 2 * steps + 8)
    before = held_out(base, rows[:8])

    lm: Any = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"])).train()
    for name, parameter in lm.named_parameters():
        if "mlp" in name:  # PEFT froze the base; these are to be trained
            parameter.requires_grad_(True)
    misa = passes.Misa(budget=0.03, period=10, targets=r".*mlp.*_proj", always=".*lora_.*")
    flat = [passes.FlatLora(rho=rho, steps=steps)] if rho else []
    surgery.apply(lm, [misa, *flat, passes.Recompute(), passes.ChunkedLoss()])
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-4, weight_decay=0.0)
    for ids in rows[8:].split(2):
        lm(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = held_out(lm, rows[:8])

    surgery.export(lm, out)
    plain = AutoModelForCausalLM.from_pretrained(out)
    loaded = held_out(PeftModel.from_pretrained(plain, out / "adapters"), rows[:8])
    print(f"held-out loss {before:.4f} -> {after:.4f}, exported and loaded {loaded:.4f}")


if __name__ == "__main__":
    typer.run(main)
