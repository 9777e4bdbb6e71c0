"""Records into rows of tokens, and rows into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from surgery import noise
from surgery.cli.records import column
from surgery.errors import OptionError

UNLEARNED = -100  # the label that cross entropy leaves out


@dataclass(frozen=True, kw_only=True)
class Row:
    """Tokens, and what is learned: a label for each of them, or (classification) one for all."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """rows: all as long as one another if `packed`, and then without a mask. pad: token that fills
    up a batch. classes: names of labels, none for language models. cut: rows that were longer than
    `length` and are not any more. left_out: rows in which nothing was left to learn."""

    rows: Sequence[Row]
    pad: int
    packed: bool = False
    classes: tuple[str, ...] = ()
    cut: int = 0
    left_out: int = 0

    def batch(self, places: Sequence[int]) -> dict[str, Tensor]:
        """Return keyword arguments of the model's forward, on the CPU."""
        rows = [self.rows[place] for place in places]
        ids = _filled([row.ids for row in rows], self.pad)
        if self.classes:
            labels = torch.tensor([row.labels[0] for row in rows])
        else:
            labels = _filled([row.labels for row in rows], UNLEARNED)
        if self.packed:
            return {"input_ids": ids, "labels": labels}
        mask = _filled([[1] * len(row.ids) for row in rows], 0)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def learned(self, places: Sequence[int]) -> int:
        """Return how many labels the loss of a batch is the mean of."""
        if self.classes:
            return len(places)
        # The first token of a row is predicted from nothing.
        labels = (self.rows[place].labels[1:] for place in places)
        return sum(len(row) - row.count(UNLEARNED) for row in labels)


def order(count: int, seed: int, epoch: int) -> list[int]:
    """Return the places of rows in the order of an epoch; the same on every machine."""
    return torch.argsort(noise.words(count, seed, "order", epoch), stable=True).tolist()


def language_rows(
    records: Sequence[dict[str, Any]],
    tokenizer: Any,
    length: int,
    pack: bool | None,
    learn: str,
    text: str,
) -> Rows:
    """Return rows for a causal language model.

    records: with `messages` (a chat), with `prompt` and `completion`, or with the column `text`.
    pack: one document after another, cut into rows of `length`; by default, only text. learn:
    "answers" of chats and completions, or "all". Raises OptionError.
    """
    begins = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]  # Llama's does, Qwen's not
    begin, end = tokenizer.bos_token if begins else "", tokenizer.eos_token or ""
    documents = []
    for number, record in enumerate(records, 1):
        if "messages" in record:
            parts = _chat(record["messages"], tokenizer, learn, number)
        elif "prompt" in record and "completion" in record:
            prompt, completion = str(record["prompt"]), str(record["completion"])
            parts = [(begin + prompt, False), (completion + end, True)]
        else:
            parts = [(begin + column([record], text, "--text-column")[0] + end, True)]
        documents.append(_tokens(parts, tokenizer, learn == "all"))
    if pack is None:
        pack = not any("messages" in r or "prompt" in r for r in records)
    pad = _pad(tokenizer)
    return _packed(documents, length, pad) if pack else _cut(documents, length, pad)


def class_rows(
    records: Sequence[dict[str, Any]],
    tokenizer: Any,
    length: int,
    classes: tuple[str, ...],
    text: str,
    label: str,
) -> Rows:
    """Return rows for a classifier; classes: names of labels in their order. Raises OptionError."""
    texts, labels = column(records, text, "--text-column"), column(records, label, "--label-column")
    strange = sorted(set(labels) - set(classes))
    if strange:
        raise OptionError(f"labels that the training data do not have: {', '.join(strange)}.")
    found = [tokenizer(each).input_ids for each in texts]
    long = [i for i, ids in enumerate(found) if len(ids) > length]
    for i in long:  # not by slicing: a tokenizer keeps its marks at the ends
        found[i] = tokenizer(texts[i], truncation=True, max_length=length).input_ids
    return Rows(
        rows=[Row(ids=i, labels=[classes.index(k)]) for i, k in zip(found, labels, strict=True)],
        pad=_pad(tokenizer),
        classes=classes,
        cut=len(long),
    )


def _chat(messages: Any, tokenizer: Any, learn: str, number: int) -> list[tuple[str, bool]]:
    """Return a chat as its template writes it, in parts: is it an answer?"""
    if not getattr(tokenizer, "chat_template", None):
        raise OptionError(
            "the data are chats, but the tokenizer has no chat template. Give the tokenizer of an "
            "instruct model: --tokenizer=..."
        )
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        parts, done = [], ""
        for i, message in enumerate(messages if learn == "answers" else ()):
            if message["role"] != "assistant":
                continue
            before = tokenizer.apply_chat_template(
                messages[:i], tokenize=False, add_generation_prompt=True
            )
            after = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
            if not (whole.startswith(after) and after.startswith(before)):
                raise OptionError(
                    f"record {number}: the chat template writes earlier turns differently when "
                    "later ones follow, so answers cannot be told from the rest. Learn all of it: "
                    "--learn all."
                )
            parts += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
    except OptionError:
        raise
    except Exception as error:  # of a template, of any kind
        raise OptionError(f"record {number}: the chat template rejects it: {error}") from error
    return [*parts, (whole[len(done) :], learn == "all")]


def _tokens(parts: Sequence[tuple[str, bool]], tokenizer: Any, whole: bool) -> Row:
    ids: list[int] = []
    labels: list[int] = []
    for text, learned in parts:
        found = tokenizer(text, add_special_tokens=False).input_ids if text else []
        ids += found
        labels += found if learned or whole else [UNLEARNED] * len(found)
    return Row(ids=ids, labels=labels)


def _packed(documents: Sequence[Row], length: int, pad: int) -> Rows:
    ids = list(chain.from_iterable(row.ids for row in documents))
    labels = list(chain.from_iterable(row.labels for row in documents))
    starts = range(0, len(ids) - length + 1, length)
    if not starts:
        raise OptionError(
            f"the data have {len(ids)} tokens, fewer than a row of {length}. Use a smaller "
            "--length."
        )
    rows = [Row(ids=ids[at : at + length], labels=labels[at : at + length]) for at in starts]
    return _kept(Rows(rows=rows, pad=pad, packed=True), length)


def _cut(documents: Sequence[Row], length: int, pad: int) -> Rows:
    rows = [Row(ids=row.ids[:length], labels=row.labels[:length]) for row in documents]
    cut = sum(len(row.ids) > length for row in documents)
    return _kept(Rows(rows=rows, pad=pad, cut=cut), length)


def _kept(found: Rows, length: int) -> Rows:
    """Return rows without those in which nothing is learned: their loss would be no number."""
    kept = [row for row in found.rows if any(label != UNLEARNED for label in row.labels[1:])]
    if not kept:
        raise OptionError(
            f"no record reaches what is to be learned in {length} tokens. Use a larger --length."
        )
    return replace(found, rows=kept, left_out=len(found.rows) - len(kept))


def _filled(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def _pad(tokenizer: Any) -> int:
    # Masked, so any token will do.
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def places_of(step: int, micro: int, batch: int, count: int, seed: int) -> Iterator[list[int]]:
    """Return the rows of each micro-batch of a step: a function of the step alone."""
    at = step * micro * batch
    orders: dict[int, list[int]] = {}
    for start in range(at, at + micro * batch, batch):
        places = []
        for i in range(start, start + batch):
            epoch, place = divmod(i, count)
            if epoch not in orders:
                orders[epoch] = order(count, seed, epoch)
            places.append(orders[epoch][place])
        yield places
