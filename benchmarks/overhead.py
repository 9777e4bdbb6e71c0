"""Overhead of `surgery.apply` with every parameter trained, against eager: time per AdamW step.

python -m benchmarks.overhead
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import surgery
from benchmarks.common import alternate, ratio, save
from examples.real import kjv, smollm2, token_rows
from surgery.weights.modules import is_matrix
from surgery.weights.targets import blocks


def everything(model: torch.nn.Module) -> torch.nn.Module:
    inside = {name for names in blocks(model).values() for name in names}
    rest = [n for n, _ in model.named_parameters() if n not in inside or not is_matrix(model, n)]
    return surgery.apply(model, "misa", budget=1.0, always=rest)


def stepper(model: Any, ids: torch.Tensor, phase: str) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        loss = model(input_ids=ids, labels=ids).loss
        if phase != "forward":
            loss.backward()
        if phase == "step":
            optimizer.step()
        optimizer.zero_grad()

    return step


def compare(model: Any, ids: torch.Tensor, times: int) -> dict[str, Any]:
    eager, ours = model.train(), everything(copy.deepcopy(model).train())
    result: dict[str, Any] = {"tokens": list(ids.shape)}
    for phase in ("step", "forward_backward", "forward"):
        seconds = alternate(
            {"eager": stepper(eager, ids, phase), "surgery": stepper(ours, ids, phase)}, times
        )
        result[phase] = {
            "ratio": round(ratio(seconds, "surgery", "eager"), 4),
            "milliseconds": {n: round(1e3 * statistics.median(s), 2) for n, s in seconds.items()},
        }
        print(phase, result[phase], flush=True)
    return result


def main() -> None:
    logging.set_verbosity_error()
    torch.manual_seed(0)
    tiny = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=32,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    result = {"tiny_llama_32_blocks": compare(tiny, torch.randint(0, 512, (2, 32)), times=21)}
    model, tokenizer = smollm2(layers=8)
    ids = token_rows(kjv(), tokenizer, 256, 2)
    result["smollm2_8_blocks"] = compare(model, ids, times=25)
    save("overhead", result)


if __name__ == "__main__":
    main()
