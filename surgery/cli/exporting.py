"""`surgery export RUN FOLDER`: a run's checkpoint as a plain one, at any step of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import surgery
from surgery.checkpoints.folder import read_record
from surgery.cli import loading
from surgery.cli.loop import CHECKPOINT, SHAPE
from surgery.cli.screen import err, out
from surgery.errors import OptionError


def export_run(
    run: Annotated[Path, typer.Argument(help="Folder of `surgery train`, or of surgery.save.")],
    folder: Annotated[Path, typer.Argument(help="Where the plain checkpoint goes.")],
    model: Annotated[str | None, typer.Option(help="What was trained, if not by train.")] = None,
    max_shard_size: str = "50GB",
) -> None:
    """Write what plain transformers loads: config.json, model.safetensors, tokenizer, a card."""
    saved = run / CHECKPOINT if (run / CHECKPOINT).exists() else run
    record = read_record(saved)
    source = model or (str(run / SHAPE) if (run / SHAPE).exists() else None)
    if source is None:
        raise OptionError(f"{run} does not say which model it was made from. Name it: --model=...")
    with err().status("loading"):
        made = loading.shape_of(source, record)
        surgery.apply(made, surgery.saved_passes(saved))
        surgery.load(made, saved, optimizer=False, scheduler=False)
        surgery.export(made, folder, max_shard_size=max_shard_size)
        loading.tokenizer_of(source).save_pretrained(folder)
    out().print(f"{folder}: {type(made).__name__}, for from_pretrained", soft_wrap=True)
