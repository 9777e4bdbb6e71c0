"""The HF Trainer, plain: the plain loop's run, resumed and evaluated as its users do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from laws import PASSES, own, state_of
from models import FAMILIES, QUIET, batch, make
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.hyperparameter_search import (
    ALL_HYPERPARAMETER_SEARCH_BACKENDS,
    HyperParamSearchBackendBase,
)
from transformers.trainer_utils import HPSearchBackend

import passes
import surgery

# AdamW over the scalars of zeroth-order passes; accelerate and transformers announce renamings.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*scalars that"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
]
ROWS = ["misa", "lisa", "badam", "velora", "rso", "misa_and_both", "compress"]
ROWS += ["mezo", "sparse_mezo", "lozo", "subzero"]
assert set(ROWS) <= set(PASSES) and "llama" in FAMILIES


def data(count: int) -> list[dict[str, torch.Tensor]]:
    """Rows with labels of different lengths, so that the mean over a step is not that of means."""
    rows = batch("llama", rows=count, length=10, seed=3)
    for i, labels in enumerate(rows["labels"]):
        labels[: i % 4] = -100
    return [{name: tensor[i] for name, tensor in rows.items()} for i in range(count)]


def trainer_of(model, folder, callbacks=(), model_init=None, **options):
    base = dict(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
    )
    arguments = TrainingArguments(**QUIET | base | options)
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=data(24),
        eval_dataset=data(4),
        callbacks=[*callbacks],
        model_init=model_init,
    )


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def plain_loop(model, half: bool) -> list[float]:
    """What the Trainer does, written down: mean over all labels of a step, clipping, schedule."""
    decay = [p for n, p in model.named_parameters() if p.requires_grad and "norm" not in n]
    rest = [p for n, p in model.named_parameters() if p.requires_grad and "norm" in n]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)  # as is the Trainer's default
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / 6)
    rows, losses = data(24), []
    for step in range(6):
        micro = [rows[4 * step + i : 4 * step + i + 2] for i in (0, 2)]
        stacked = [{k: torch.stack([r[k] for r in part]) for k in part[0]} for part in micro]
        count = sum((part["labels"][:, 1:] != -100).sum() for part in stacked)
        total = 0.0
        for part in stacked:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = model(**part, num_items_in_batch=count).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize(
    ("row", "setting"),
    [(row, "float32") for row in ROWS]
    + [(row, "bf16 autocast") for row in ("misa_and_both", "velora")]
    + [(row, "checkpointing") for row in ("misa_and_both", "rso")],
)
def test_the_plain_loop_gives_the_same_run(row, setting, tmp_path):
    # The Trainer switches the cache off, which changes what there is to pack or to recompute.
    models = [make("llama", tie_word_embeddings=True, use_cache=False) for _ in range(2)]
    for model in models:
        surgery.apply(model, PASSES[row]())
    half = setting == "bf16 autocast"
    checkpointing = setting == "checkpointing"
    trainer = trainer_of(models[0], tmp_path, bf16=half, gradient_checkpointing=checkpointing)
    trainer.train()
    if checkpointing:
        models[1].gradient_checkpointing_enable({"use_reentrant": False})
    expected = plain_loop(models[1], half)
    assert losses_of(trainer) == pytest.approx(expected, rel=2e-4)  # it logs four digits
    for name, parameter in own(models[1]).items():
        assert torch.equal(own(models[0])[name], parameter), name
    assert state_of(models[0]).clock.step == 6
    assert list(models[0].state_dict()) == list(models[1].state_dict())
    surgery.remove(models[0])
    assert "forward" not in models[0].__dict__


@pytest.mark.parametrize("row", ["misa", "velora_redrawn", "sparse_mezo"])
def test_a_resumed_run_is_the_uninterrupted_one(row, tmp_path):
    def begin(seed):
        return surgery.apply(make("llama", seed), PASSES[row]())

    whole = begin(0)
    trainer_of(whole, tmp_path / "whole").train()
    first = begin(0)
    callback = surgery.TrainerCallback()
    saving = dict(save_strategy="steps", save_steps=3)
    trainer = trainer_of(first, tmp_path / "cut", [callback], **saving)
    trainer.train()
    assert (tmp_path / "cut" / "checkpoint-3" / "surgery_config.json").exists()
    again = begin(5)
    trainer = trainer_of(again, tmp_path / "cut", [surgery.TrainerCallback()], **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert state_of(again).clock.step == 6
    for name, parameter in own(whole).items():
        assert torch.equal(own(again)[name], parameter), name


def test_resuming_without_the_state_is_refused(tmp_path):
    saving = dict(save_strategy="steps", save_steps=3)
    trainer_of(surgery.apply(make("llama"), "badam"), tmp_path, **saving).train()
    checkpoint = str(tmp_path / "checkpoint-3")
    model = surgery.apply(make("llama"), "badam")
    trainer = trainer_of(model, tmp_path, [surgery.TrainerCallback()], **saving)
    with pytest.raises(surgery.CheckpointError, match=r"resumes at step 3.*TrainerCallback\(\)"):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer = trainer_of(surgery.apply(make("llama"), "badam"), tmp_path, **saving)
    with pytest.raises(surgery.OptimizerError, match=r"has already made 3 steps.*surgery\.load"):
        trainer.train(resume_from_checkpoint=checkpoint)


def test_evaluation_and_the_best_model(tmp_path):
    model = surgery.apply(make("llama"), passes.Misa(budget=0.2, period=2))
    options = dict(eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)
    trainer = trainer_of(
        model,
        tmp_path,
        [surgery.TrainerCallback()],
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        learning_rate=0.5,
        **options,
    )
    trainer.train()
    evaluated = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(evaluated, key=evaluated.__getitem__)
    assert best != 6  # at such a learning rate
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[best], rel=1e-4)


class Search(HyperParamSearchBackendBase):
    """What optuna does for a Trainer, with two trials."""

    name = "optuna"

    @staticmethod
    def is_available():
        return True

    def run(self, trainer, n_trials, direction, **kwargs):
        for number in range(n_trials):
            trainer.objective = None
            trainer.train(trial=SimpleNamespace(number=number, params={}))
            self.ends.append({n: p.detach().clone() for n, p in own(trainer.model).items()})


@pytest.mark.parametrize("named", [False, True], ids=["run-0", "named"])
def test_a_search_of_hyperparameters_saves_beside_its_own_checkpoints(named, tmp_path, monkeypatch):
    """Each trial is the run of its own Trainer, and is resumed from its own checkpoint."""
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Search)
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    monkeypatch.setattr(Search, "ends", [], raising=False)
    rates, saving = (1e-2, 1e-3), dict(save_strategy="steps", save_steps=3)

    def begin():  # a Trainer switches the cache off in the first model only
        return surgery.apply(make("llama", use_cache=False), passes.BAdam(period=2))

    def one(folder, rate, callback=None, resume=None):
        callback = callback or surgery.TrainerCallback()
        trainer = trainer_of(begin(), folder, [callback], learning_rate=rate, **saving)
        trainer.train(resume_from_checkpoint=resume)
        return own(trainer.model)

    (tmp_path / "other" / "checkpoint-3").mkdir(parents=True)  # of an older run
    trainer = trainer_of(None, tmp_path, [surgery.TrainerCallback()], model_init=begin, **saving)
    trainer.hyperparameter_search(
        lambda trial: {"learning_rate": rates[trial.number]},
        n_trials=2,
        backend="optuna",
        hp_name=(lambda trial: f"rate {rates[trial.number]}") if named else None,
    )
    for number, rate in enumerate(rates):
        at = tmp_path / (f"rate {rate}" if named else f"run-{number}") / "checkpoint-3"
        assert (at / "surgery_config.json").is_file()
        alone = one(tmp_path / "alone", rate)
        again = one(tmp_path / "again", rate, surgery.TrainerCallback(at), str(at))
        for name, value in Search.ends[number].items():
            assert torch.equal(alone[name], value), (rate, name)
            assert torch.equal(again[name], value), (rate, name)
    assert not list((tmp_path / "other" / "checkpoint-3").iterdir())


def _prompts(model):
    return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def _opened(model):
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name or "down_proj" in name)
    return model


@pytest.mark.parametrize("adapt", [_prompts, _opened])
def test_adapters_under_exact_passes_are_resumed(adapt, tmp_path):
    runs = []
    for steps in (6, 3, 6):
        torch.manual_seed(0)  # prompts are drawn
        model = surgery.apply(adapt(make("llama")), "recompute")
        folder = tmp_path / ("whole" if not runs else "parts")
        callback = surgery.TrainerCallback()
        trainer = trainer_of(
            model, folder, [callback], save_strategy="steps", save_steps=3, max_steps=steps
        )
        trainer.args.lr_scheduler_type = "constant"
        trainer.train(resume_from_checkpoint=True if len(runs) == 2 else None)
        runs.append(own(model))
    assert any(not torch.equal(value, runs[1][name]) for name, value in runs[0].items())
    assert all(torch.equal(value, runs[2][name]) for name, value in runs[0].items())
