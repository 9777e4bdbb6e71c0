"""TRL's SFTTrainer and Lightning Fabric: the plain loop's run."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from laws import PASSES, own, state_of
from lightning_fabric import Fabric
from models import QUIET, VOCAB, batch, inputs_of, loss_of, make
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import surgery

# The packages announce renamings.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
]
ROWS = ["misa", "lisa", "badam", "rso", "velora", "recompute", "chunked_loss", "compress"]
ZEROTH = ["mezo", "sparse_mezo", "lozo", "subzero"]
STEPS, BATCH, LR = 5, 2, 0.1


def begin(row: str):
    """A surgery, its optimizer not yet built; the cache is off, as trainers switch it off."""
    return surgery.apply(make("llama", use_cache=False), PASSES[row]())


def batches() -> list[torch.Tensor]:
    return list(batch("llama", rows=STEPS * BATCH, length=10, seed=3)["input_ids"].split(BATCH))


def plain_loop(model, clip: float) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    losses = []
    for ids in batches():
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_same_run(model, other) -> None:
    assert state_of(model).clock.step == state_of(other).clock.step == STEPS
    for name, parameter in own(other).items():
        torch.testing.assert_close(own(model)[name], parameter, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("row", ROWS + ZEROTH)
def test_fabric(row):
    fabric = Fabric(accelerator="cpu", devices=1)
    models = [surgery.apply(make("plain"), PASSES[row]()) for _ in range(2)]
    rate = 1e-3 if row in ZEROTH else LR  # a step goes along all coordinates at once
    optimizers = [torch.optim.SGD(model.parameters(), lr=rate) for model in models]
    wrapped, optimizers[0] = fabric.setup(models[0], optimizers[0])
    losses: list[list[float]] = [[], []]
    for seed in range(STEPS):
        batch = inputs_of("plain", seed=seed)
        for i, model in enumerate((wrapped, models[1])):
            loss = loss_of(model, batch)
            if i == 0:
                fabric.backward(loss)
            else:
                loss.backward()
            optimizers[i].step()
            optimizers[i].zero_grad()
            losses[i].append(loss.item())
    assert losses[0] == losses[1]
    assert_same_run(*models)


def sft(model, folder) -> SFTTrainer:
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")),
        pad_token="w0",
        eos_token="w1",
    )
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        optim="sgd",  # its head rounds in its own way, and Adam's first steps are signs
        learning_rate=LR,
        lr_scheduler_type="constant",
        **QUIET,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
    )
    rows = [{"input_ids": ids.tolist()} for part in batches() for ids in part]
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("row", ["misa", "badam", "rso", "velora", "recompute", "compress"])
def test_sft_trainer(row, tmp_path):
    """It has a forward of its own, with a fused head: surgery comes afterwards, and captures it."""
    trainer = sft(make("llama", use_cache=False), tmp_path)
    surgery.apply(trainer.model, PASSES[row]())
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    other = begin(row)
    assert logged == pytest.approx(plain_loop(other, clip=1.0), rel=2e-4)  # it logs four digits
    if row == "compress":  # rounded at random, and otherwise behind another head
        start = make("llama")
        for name, parameter in own(other).items():
            moved = (parameter - start.get_parameter(name)).norm()
            assert (own(trainer.model)[name] - parameter).norm() < 0.1 * moved, name
    else:
        assert_same_run(trainer.model, other)


def test_sft_trainer_on_a_model_that_has_surgery_already(tmp_path):
    with pytest.raises(surgery.SurgeryError, match=r"went around surgery.*after it"):
        sft(begin("misa"), tmp_path).train()


@pytest.mark.parametrize("row", ["lisa", *ZEROTH])
def test_what_the_fused_head_of_sft_trainer_leaves_no_room_for(row, tmp_path):
    trainer = sft(make("llama", use_cache=False), tmp_path)
    surgery.apply(trainer.model, PASSES[row]())
    with pytest.raises(surgery.CaptureError, match=r"lm_head\.weight"):
        trainer.train()
