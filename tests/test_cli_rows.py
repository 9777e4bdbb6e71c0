"""Data of `surgery train`: what is learned, packed, padded, and in which order it comes."""

from __future__ import annotations

import commands
import pytest

import surgery
from surgery.cli.rows import UNLEARNED, language_rows, order, places_of


@pytest.fixture
def tokenizer():
    return commands.tokenizer()


def rows_of(records, tokenizer, length=64, pack=None, learn="answers"):
    return language_rows(records, tokenizer, length, pack, learn, "text")


def test_only_answers_of_a_chat_are_learned(tokenizer):
    messages = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "and a dog"},
        {"role": "assistant", "content": "ran up"},
    ]
    found = rows_of([{"messages": messages}], tokenizer)
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False)).input_ids
    learned = [i for i in found.rows[0].labels if i != UNLEARNED]
    assert found.rows[0].ids == whole and not found.packed
    assert tokenizer.decode(learned) == "sat <e> ran up <e>"
    every = rows_of([{"messages": messages}], tokenizer, learn="all")
    assert every.rows[0].labels == whole


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer, monkeypatch):
    messages = [{"role": r, "content": "cat"} for r in ("user", "assistant") * 2]
    template = "{{ messages|length }}" + commands.CHAT
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(surgery.OptionError, match=r"record 1: .*--learn all"):
        rows_of([{"messages": messages}], tokenizer)


def test_completions_are_learned_and_prompts_not(tokenizer):
    found = rows_of([{"prompt": "the cat", "completion": "sat"}], tokenizer)
    the, cat, sat, end = tokenizer("the cat sat <e>").input_ids
    assert found.rows[0].ids == [the, cat, sat, end]
    assert found.rows[0].labels == [UNLEARNED, UNLEARNED, sat, end]


def test_packing_loses_nothing_but_the_end(tokenizer):
    records = [{"text": "the cat sat"}, {"text": "on a mat and ran"}]
    found = rows_of(records, tokenizer, length=4)
    joined = tokenizer("the cat sat <e> on a mat and ran <e>").input_ids
    assert [i for row in found.rows for i in row.ids] == joined[:8]
    assert found.packed and set(found.batch([0, 1])) == {"input_ids", "labels"}


def test_batches_are_padded_and_masked(tokenizer):
    found = rows_of([{"text": "the cat"}, {"text": "the cat sat on"}], tokenizer, pack=False)
    batch = found.batch([0, 1])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"][0, 3:].tolist() == [UNLEARNED] * 2
    assert found.learned([0, 1]) == 2 + 4


def test_every_epoch_visits_every_row_once():
    seen = [p for step in range(10) for b in places_of(step, 2, 3, 20, 5) for p in b]
    assert sorted(seen[:20]) == sorted(seen[20:40]) == list(range(20))
    assert seen[:20] == order(20, 5, 0) != seen[20:40]
