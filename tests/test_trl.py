"""TRL's trainers with their own heads in chunks: the run that they make without surgery."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from models import QUIET, VOCAB, make
from test_other_trainers import STEPS, sft
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
)

import passes
import surgery

# The packages announce renamings.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory", "ignore:.*experimental"),
]
ROWS: dict[str, Callable[[], list[Any]]] = {
    "recompute + chunked_loss": lambda: [passes.Recompute(), passes.ChunkedLoss()],
    "misa": lambda: [passes.Misa(budget=1.0)],  # all that it samples from
}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w1"
    )


def text(*places: int) -> str:
    return " ".join(f"w{2 + place % (VOCAB - 2)}" for place in places)


def common(folder: Any) -> dict[str, Any]:
    return dict(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        bf16=False,
        gradient_checkpointing=False,
        **QUIET,
    )


def beside_a_reference(kind: Any, model: nn.Module, arguments: Any, rows: list[Any]) -> Any:
    return kind(
        model=model,
        ref_model=make("llama", seed=3, use_cache=False),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )


def dpo(model: nn.Module, folder: Any) -> Any:
    rows = [
        {"prompt": text(i, i + 1), "chosen": " " + text(i + 2, i + 5), "rejected": " " + text(i, 9)}
        for i in range(2 * STEPS)
    ]
    return beside_a_reference(DPOTrainer, model, DPOConfig(**common(folder), max_length=16), rows)


def kto(model: nn.Module, folder: Any) -> Any:
    rows = [
        {"prompt": text(i, i + 1), "completion": " " + text(i + 2, i + 7), "label": i % 2 == 0}
        for i in range(2 * STEPS)
    ]
    return beside_a_reference(KTOTrainer, model, KTOConfig(**common(folder), max_length=16), rows)


def grpo(model: nn.Module, folder: Any) -> Any:
    arguments = common(folder) | dict(max_steps=2, per_device_train_batch_size=4)
    return GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(set(c))) for c in completions],
        args=GRPOConfig(**arguments, max_completion_length=6, num_generations=2),
        train_dataset=Dataset.from_list([{"prompt": text(i, i + 3)} for i in range(8)]),
        processing_class=tokenizer(),
    )


def reward(model: nn.Module, folder: Any) -> Any:
    config = transformers.LlamaConfig(**make("llama").config.to_dict() | {"num_labels": 1})
    config.pad_token_id = 0
    torch.manual_seed(0)
    scored = transformers.LlamaForSequenceClassification(config)
    rows = [{"chosen": text(i, i + 2, 5), "rejected": text(i, i + 3)} for i in range(2 * STEPS)]
    return RewardTrainer(
        model=scored,
        args=RewardConfig(**common(folder), max_length=16),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )


TRAINERS = {"SFT": sft, "DPO": dpo, "KTO": kto, "GRPO": grpo, "Reward": reward}


def run(name: str, spec: list[Any] | None, row: str, folder: Any) -> tuple[Any, ...]:
    torch.manual_seed(0)
    trainer = TRAINERS[name](make("llama", use_cache=False), folder)
    if spec:
        surgery.apply(trainer.model, spec)
    elif row == "misa":  # the head and the embeddings stay as they are
        for key, p in trainer.model.named_parameters():
            p.requires_grad_("_proj" in key)
    torch.manual_seed(1)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    report = str(surgery.report(trainer.model)) if spec else ""
    return losses, {n: t.clone() for n, t in trainer.model.state_dict().items()}, report


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_is_that_without_surgery(name, row, tmp_path):
    expected, kept, _ = run(name, None, row, tmp_path / "plain")
    spec = ROWS[row]()
    if name == "Reward":  # a score a sequence: there are no logits
        spec = spec[:1]
    losses, weights, report = run(name, spec, row, tmp_path)
    assert losses == pytest.approx(expected, rel=2e-4, abs=1e-6)  # it logs four digits
    for key, value in kept.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-6, msg=key)
    if row.endswith("chunked_loss") and name != "Reward":
        assert "TRL computes them in chunks of its own" in report
