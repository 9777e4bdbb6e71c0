"""Lightning's Trainer as it is by default: automatic optimization, a step with a closure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import PASSES, own, state_of
from models import inputs_of, loss_of, make

import surgery

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
ROWS = ["misa", "lisa", "badam", "rso", "velora", "recompute", "chunked_loss", "compress"]
ROWS += ["mezo", "sparse_mezo", "lozo", "subzero"]
STEPS, MICRO = 5, 2


def task_of(lightning: Any, model: torch.nn.Module, losses: list[float]) -> Any:
    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch, index):
            loss = loss_of(model, batch)
            losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    return Task()


@pytest.mark.parametrize("row", ROWS)
def test_automatic_optimization_gives_the_plain_loop(row, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    models = [surgery.apply(make("plain"), PASSES[row]()) for _ in range(2)]
    data = [inputs_of("plain", seed=seed) for seed in range(STEPS * MICRO)]
    losses: list[list[float]] = [[], []]
    trainer = lightning.Trainer(
        max_epochs=1,
        accumulate_grad_batches=MICRO,
        gradient_clip_val=1.0,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    trainer.fit(task_of(lightning, models[0], losses[0]), loader)
    optimizer = torch.optim.AdamW(models[1].parameters(), lr=1e-3, fused=True)
    for i, batch in enumerate(data):
        loss = loss_of(models[1], batch)
        losses[1].append(float(loss.detach()))
        (loss / MICRO).backward()
        if i % MICRO == MICRO - 1:
            torch.nn.utils.clip_grad_norm_(models[1].parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert losses[0] == losses[1]
    for name, parameter in own(models[1]).items():
        assert torch.equal(own(models[0])[name], parameter), name
    clocks = [state_of(model).clock for model in models]
    assert clocks[0].step == clocks[1].step
    assert clocks[0].step == STEPS or row in ("recompute", "chunked_loss", "compress")
