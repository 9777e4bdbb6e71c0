"""The HF Trainer: it needs nothing of ours but, for resuming, this callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback as Callback

from surgery.checkpoints import adapters
from surgery.checkpoints.folder import RECORD
from surgery.checkpoints.run import load, save
from surgery.engine.finding import applied
from surgery.errors import CheckpointError


class TrainerCallback(Callback):
    """Saves the surgery's state with each `checkpoint-*` of a Trainer, and restores it.

        Trainer(model=model, callbacks=[surgery.TrainerCallback()], ...)

    The Trainer itself saves weights, optimizer, schedule and generators, but not the base of a PEFT
    model, whose weights the callback saves if they are trained. folder: the checkpoint to resume
    from, if it does not lie in `output_dir`. Raises CheckpointError when a run is resumed from a
    checkpoint without the surgery's state, or with other weights.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save beside the checkpoint that has just been written."""
        model = kwargs["model"]
        save(model, _written(args, state), weights=_trains_base(model))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on where the checkpoint was written; do nothing when a run begins."""
        applied(kwargs["model"])
        if state.global_step == 0:
            return
        folder = self.folder or _resumed(args, state)
        if not (folder / RECORD).is_file():
            raise CheckpointError(
                f"the Trainer resumes at step {state.global_step}, and {folder} holds no {RECORD}: "
                "it was written without surgery.TrainerCallback(), or lies elsewhere: "
                "surgery.TrainerCallback(folder=...)."
            )
        load(kwargs["model"], folder)


def _trains_base(model: Any) -> bool:
    """Whether weights are trained that the Trainer does not save: under adapters."""
    if not adapters.are_on(model):
        return False
    own, sites = adapters.of_base(model), applied(model).decision.sites
    trained = [p for p in model.parameters() if p.requires_grad]  # under exact passes alone
    return any(id(each) in own for each in [site.current() for site in sites] or trained)


def _written(args: Any, state: Any) -> Path:
    """Return the checkpoint that has just been written."""
    found = _checkpoints(args, state)
    return max(found, key=lambda each: each.stat().st_mtime_ns, default=_plain(args, state))


def _resumed(args: Any, state: Any) -> Path:
    """Return the checkpoint that is resumed from, as far as can be told."""
    plain, found = _plain(args, state), _checkpoints(args, state)
    return found[0] if len(found) == 1 and not plain.is_dir() else plain


def _checkpoints(args: Any, state: Any) -> list[Path]:
    """Return all of this step: a search of hyperparameters has a folder for each trial."""
    plain = _plain(args, state)
    # A state that was resumed from has the name of its trial, too.
    trial = plain.parent / (state.trial_name or "") / plain.name
    found = {plain, trial, *plain.parent.glob(f"*/{plain.name}")}
    return [each for each in found if each.is_dir()]


def _plain(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
