"""The loop of `surgery train`: what any plain loop has, resumable at any step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from surgery import noise
from surgery.cli.metrics import Metrics, memory_of
from surgery.cli.processes import agreed
from surgery.cli.rows import Rows, places_of
from surgery.cli.settings import Settings
from surgery.cli.stopping import Stopping
from surgery.ranks import add_up, rank_of_world

CHECKPOINT, SHAPE = "checkpoint", "config"  # of the folder of a run


@dataclass(kw_only=True)
class Loop:
    """A model under surgery and what trains it. outer: what wraps it for several processes, or
    itself. steps: of the whole run. step: those made so far.

    Everything that a step depends on is a function of its number: rows, dropout, rate. So a save
    of `surgery.save` is all that is needed to go on.
    """

    model: Any
    outer: Any
    settings: Settings
    rows: Rows
    held: Rows
    steps: int
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    folder: Path
    step: int = 0
    metrics: Metrics = field(init=False)

    def __post_init__(self) -> None:
        saved = self.folder / CHECKPOINT
        if saved.exists():
            surgery.load(self.model, saved, self.optimizer, self.scheduler)
            self.step = self.scheduler.last_epoch
        self.metrics = Metrics(self.folder, self.step)

    def run(
        self, evaluate: int, save: int, told: Callable[[Mapping[str, Any]], None], stop: Stopping
    ) -> None:
        """Train until the end, or until a signal, and save.

        evaluate, save: steps between two evaluations and two checkpoints, 0 for none but at the
        end. told: is told each step's numbers.
        """
        saved = self.step
        while self.step < self.steps:
            stop.number = agreed(stop.number, self._device)
            if stop.number is not None:
                break
            values = self._make_step()
            self.metrics.add(**values)
            told(values)
            last = self.step == self.steps
            if self.held.rows and (last or (evaluate and self.step % evaluate == 0)):
                found = self.evaluate()
                self.metrics.add(step=self.step, **found)
                told(values | found)
            if save and self.step % save == 0:
                self._save()
                saved = self.step
        if saved < self.step:
            self._save()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the mean loss over what is held out, and the accuracy of a classifier."""
        self.model.eval()
        total = right = count = 0.0
        for start in range(0, len(self.held.rows), self.settings.batch):
            places = range(start, min(start + self.settings.batch, len(self.held.rows)))
            batch = self.held.batch(places)
            output = self._forward(self.model, batch)
            learned = self.held.learned(places)
            total += output.loss.item() * learned
            count += learned
            if self.held.classes:
                right += int((output.logits.argmax(-1).cpu() == batch["labels"]).sum())
        self.model.train()
        accuracy = {"accuracy": right / count} if self.held.classes else {}
        return {"evaluation": total / count} | accuracy

    def _make_step(self) -> dict[str, Any]:
        began = time.perf_counter()
        own = self.settings
        rank, world = rank_of_world()
        torch.manual_seed(noise.bits(own.seed, "dropout", self.step, rank))
        joint = own.batch * world
        places = list(places_of(self.step, own.accumulate, joint, len(self.rows.rows), own.seed))
        learned = sum(map(self.rows.learned, places))
        mean = torch.zeros((), device=self._device)
        for each in places:
            part = each[rank * own.batch : (rank + 1) * own.batch]
            # Of all labels of the step, as one large batch would have it; ranks are averaged.
            share = self.rows.learned(part) / learned * world
            loss = self._forward(self.outer, self.rows.batch(part)).loss * share
            loss.backward()
            mean += loss.detach() / world
        add_up(mean)
        if own.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), own.clip)
        rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.step += 1
        tokens = sum(len(self.rows.rows[place].ids) for each in places for place in each)
        return {
            "step": self.step,
            "loss": mean.item(),
            "lr": rate,
            "tokens_per_second": tokens / (time.perf_counter() - began),
            "memory": memory_of(self._device),
        }

    def _forward(self, model: Any, batch: Mapping[str, Tensor]) -> Any:
        with self._autocast():
            return model(**{key: value.to(self._device) for key, value in batch.items()})

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.settings.autocast is None:
            return nullcontext()
        return torch.autocast(self._device.type, getattr(torch, self.settings.autocast))

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _save(self) -> None:
        surgery.save(self.model, self.folder / CHECKPOINT, self.optimizer, self.scheduler)


def rate(schedule: str, warmup: int, steps: int) -> Callable[[int], float]:
    """Return the factor of a step's rate: up in a line, then down along a cosine, or level."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if schedule == "constant":
            return 1.0
        done = (step - warmup) / max(1, steps - warmup)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))

    return factor
