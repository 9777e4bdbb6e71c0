"""trim beside plain AdamW on a copy of the model whose other rows are put back after each step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from laws import case, own
from models import adapt, batch, loss_of, make
from test_export import loaded, same_outputs
from torch import nn

import passes
import surgery
import surgery.testing
from surgery.memory import state_bytes, storage_bytes

DATA = [batch("llama", seed=seed) for seed in range(6)]
USED = sorted({*torch.cat([each["input_ids"].flatten() for each in DATA]).tolist()})
ABSENT = sorted({*range(96)} - {*USED})
MODELS = {
    "untied": lambda: make("llama"),
    "tied": lambda: make("llama", tie_word_embeddings=True),
    "gpt2, tied": lambda: make("gpt2"),
    "bert, padding": lambda: make("bert"),
    "roberta": lambda: make("roberta"),
    "t5, two lookups": lambda: make("t5"),
    "an encoder": lambda: classifier(),
}


def classifier() -> nn.Module:
    base: Any = make("bert")
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(base.config).train()


def tables(model: Any) -> dict[str, nn.Parameter]:
    """The embedding, and an untied head of as many rows."""
    found = {id(model.get_input_embeddings().weight)}
    head = model.get_output_embeddings()
    found |= {id(head.weight)} if head is not None else set()
    return {n: p for n, p in model.named_parameters() if id(p) in found}


def inputs(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    made = dict(DATA[seed])
    if "Classification" in type(model).__name__:
        made["labels"] = torch.tensor([0, 1])
    return made


@pytest.mark.parametrize("kind", MODELS)
def test_used_rows_are_stepped_by_adamw_and_others_stay(kind):
    """With weight decay, to the bit where sums are in one order: a padding row counts as used."""
    ours: Any = MODELS[kind]().eval()
    plain = copy.deepcopy(ours)
    start = {n: p.detach().clone() for n, p in plain.named_parameters()}
    surgery.apply(ours.train(), "trim", used=DATA)
    ours.eval()
    config = ours.config if "t5" in kind else None
    also = [ours.get_input_embeddings().padding_idx, getattr(config, "decoder_start_token_id", -1)]
    absent = [n for n in ABSENT if n not in also]
    assert len(absent) > 10
    both = [torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1) for m in (ours, plain)]
    for seed in range(6):
        losses = []
        for model, optimizer in zip((ours, plain), both, strict=True):
            loss = model(**inputs(model, seed)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        with torch.no_grad():
            for name, table in tables(plain).items():
                table[absent] = start[name][absent]
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(own(ours)[name], parameter, rtol=1e-5, atol=2e-6, msg=name)
    for name, table in tables(ours).items():
        assert torch.equal(table[absent], start[name][absent]), name
        assert not torch.equal(table, start[name])


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_gradients_and_state_have_the_rows_that_are_used(head):
    model: Any = MODELS[head]()
    surgery.apply(model, passes.Trim(used=USED))
    names = {*tables(model)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(**DATA[0]).loss.backward()
    assert all(own(model)[name].grad is None for name in names)
    rows = [c.parameter for c in surgery.coordinates(model) if c.weight in names]
    assert [p.grad.shape for p in rows] == [(len(USED), 32)] * len(names)
    optimizer.step()
    said, held = surgery.report(model).after, sum(len(USED) * 32 * 4 for _ in rows)
    rest = sum(4 * p.numel() for n, p in own(model).items() if n not in names)
    assert storage_bytes(p.grad for p in model.parameters() if p.grad is not None) == held + rest
    assert said.gradients == held + rest
    assert state_bytes(optimizer) == said.optimizer
    assert abs(said.optimizer - 2 * (held + rest)) < 1000  # counts of steps


@pytest.mark.parametrize(
    ("changed", "where"),
    [("input_ids", "ids"), ("labels", "labels"), ("both", "ids")],
)
def test_an_id_that_is_not_used_is_an_error(changed, where):
    model: Any = surgery.apply(MODELS["tied"](), passes.Trim(used=USED))
    before = {n: p.detach().clone() for n, p in own(model).items()}
    bad = {k: v.clone() for k, v in DATA[0].items()}
    for key in ("input_ids", "labels") if changed == "both" else (changed,):
        bad[key][0, 3] = ABSENT[0]
    with pytest.raises(surgery.ModelError, match=rf"not among used=: \[{ABSENT[0]}\].*no_grad"):
        model(**bad)
    with torch.no_grad():
        assert torch.isfinite(model(**bad).loss)  # the table is whole
    ignored = {**DATA[0], "labels": torch.full_like(DATA[0]["labels"], -100)}
    ignored["labels"][:, -1] = USED[0]
    model(**ignored).loss.backward()
    assert all(torch.equal(p, before[n]) for n, p in own(model).items())


def test_labels_of_an_encoder_are_no_words():
    model: Any = surgery.apply(classifier(), passes.Trim(used=USED))
    assert 0 not in USED and 1 not in USED
    model(input_ids=DATA[0]["input_ids"], labels=torch.tensor([0, 1])).loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_16_bits_are_stepped_in_float32(dtype):
    model = MODELS["tied"]().to(dtype)
    surgery.apply(model, passes.Trim(used=USED))
    ((name, table),) = tables(model).items()
    start = table.detach().clone()
    rows = next(c.parameter for c in surgery.coordinates(model) if c.weight == name)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(20):
        loss_of(model, DATA[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert rows.dtype == torch.float32
    near = (table[USED].float() - rows).abs() <= rows.abs() * torch.finfo(dtype).eps + 1e-6
    assert near.all() and not torch.equal(table, start)
    assert torch.equal(table[ABSENT], start[ABSENT])


@pytest.mark.parametrize("spec", ["misa", "lisa", "rso", "recompute", "chunked_loss", "both"])
def test_beside_other_passes(spec):
    """What samples or projects blocks leaves the vocabulary to trim; exact ones change nothing."""
    beside = {
        "misa": [passes.Misa(budget=0.5)],
        "lisa": [passes.Lisa(layers=1, targets=".*layers.*")],
        "rso": [passes.Rso(rank=4)],
        "recompute": [passes.Recompute()],
        "chunked_loss": [passes.ChunkedLoss()],
        "both": [passes.Recompute(), passes.ChunkedLoss()],
    }[spec]
    alone = spec in ("recompute", "chunked_loss", "both")
    found = []
    for order in (1, -1):
        model: Any = MODELS["tied"]()
        both = [*beside, passes.Trim(used=USED, rest=alone)][::order]
        surgery.apply(model, both)
        model(**DATA[0]).loss.backward()
        found.append({c.weight: c.parameter.grad for c in surgery.coordinates(model) if c.active})
    plain: Any = MODELS["tied"]()
    plain(**DATA[0]).loss.backward()
    name = "model.embed_tokens.weight"
    for grads in found:
        expected = plain.get_parameter(name).grad[USED]
        torch.testing.assert_close(grads[name], expected, rtol=1e-4, atol=1e-6)


def test_checkpoints_are_whole(tmp_path):
    model: Any = surgery.apply(MODELS["tied"](), passes.Trim(used=USED))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for each in DATA[:3]:
        model(**each).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "saved")
    surgery.export(model, tmp_path / "exported")
    assert len((tmp_path / "exported" / "README.md").read_text()) < 20_000
    for folder in ("saved", "exported"):
        found = loaded(transformers.AutoModelForCausalLM, tmp_path / folder)
        assert all(torch.equal(p, found.get_parameter(n)) for n, p in own(model).items())
        same_outputs(model, found, "llama")
    surgery.save(model, tmp_path / "run", optimizer)
    again = surgery.apply(MODELS["tied"](), surgery.saved_passes(tmp_path / "run"))
    other = torch.optim.AdamW(again.parameters(), lr=1e-2)
    surgery.load(again, tmp_path / "run", other)
    for run, own_optimizer in ((model, optimizer), (again, other)):
        run(**DATA[3]).loss.backward()
        own_optimizer.step()
    assert all(torch.equal(p, own(again)[n]) for n, p in own(model).items())


def test_used_takes_numbers_tensors_and_data_sets():
    rows = [{"input_ids": [5, 3], "labels": [-100, 7], "attention_mask": [1, 1]}]
    for used in ([7, 5, 3, 3], torch.tensor([[3, 5], [7, -100]]), rows, {"input_ids": [3, 5, 7]}):
        assert passes.Trim(used=used).used == (3, 5, 7)
    assert passes.Trim(used=[[3, 5], torch.tensor([7])]).used == (3, 5, 7)
    assert passes.Trim(used=range(3)).used == (0, 1, 2)
    assert repr(passes.Trim(used=range(3000))) == "Trim(used=<3,000 ids>, rest=True)"


@pytest.mark.parametrize(
    ("model", "used", "error", "message"),
    [
        (lambda: make("llama"), (), surgery.OptionError, "used= has no ids"),
        (lambda: make("llama"), [95, 96], surgery.OptionError, "96.*96 rows"),
        (lambda: nn.Linear(2, 2), [1], surgery.TargetError, "get_input_embeddings"),
        (lambda: make("llama").requires_grad_(False), [1], surgery.TargetError, "requires_grad"),
        (lambda: adapt(make("llama"), "lora"), [1], surgery.TargetError, "no rows to train"),
    ],
    ids=["nothing", "beyond", "no words", "frozen", "adapters"],
)
def test_what_cannot_be_trimmed_is_refused(model, used, error, message):
    with pytest.raises(error, match=message):
        surgery.apply(model(), "trim", used=used)


def test_ddp_takes_the_step_of_one_process():
    surgery.testing.two_ranks(
        surgery.testing.Case(
            spec=passes.Trim(used=range(32)),
            model=case("trim", "plain").model,
            inputs=case("trim", "plain").inputs,
        ),
        wraps=("DDP",),
    )


@pytest.mark.parametrize("row", ["trim"])
def test_fsdp2_is_refused(row):
    words = case(row, "plain")
    with pytest.raises(surgery.testing.LawError, match="FSDP2 shards its rows in its own way"):
        surgery.testing.two_ranks(words, wraps=("FSDP2",))
