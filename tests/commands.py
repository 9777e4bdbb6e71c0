"""The command line in this process, and the tiny models and data that it is given."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner, Result

from surgery.cli import app

WORDS = "the cat sat on a mat and dog ran up hill user assistant : good bad"
CHAT = "{% for m in messages %}{{ m.role }} : {{ m.content }} <e> {% endfor %}"
CHAT += "{% if add_generation_prompt %}assistant : {% endif %}"
TEXT = "the cat sat on a mat and the dog ran up a hill and sat . " * 24
LLAMA = dict(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
)


def run(*words: object, code: int = 0) -> Result:
    found = CliRunner().invoke(app, [str(word) for word in words])
    assert found.exit_code == code, (found.output, found.exception)
    return found


def refused(*words: object) -> str:
    """Return what a command says of bad input: one line, and nothing on the other stream."""
    found = run(*words, code=2)
    assert found.stdout == "" and found.stderr.count("\n") == 1
    return found.stderr


@lru_cache
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a word."""
    vocabulary = {word: i for i, word in enumerate(["<u>", "<e>", ".", *WORDS.split()])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<u>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<e>", pad_token="<e>", unk_token="<u>"
    )
    found.chat_template = CHAT
    return found


@lru_cache
def llama() -> Path:
    """Return a folder with a model of one block and its tokenizer."""
    folder = _folder()
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@lru_cache
def text() -> Path:
    path = _folder() / "text.txt"
    path.write_text(TEXT)
    return path


_KEPT: list[TemporaryDirectory[str]] = []  # until the process ends


def _folder() -> Path:
    _KEPT.append(TemporaryDirectory())
    return Path(_KEPT[-1].name)
