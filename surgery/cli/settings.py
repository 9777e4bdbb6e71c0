"""What makes a run what it is, kept beside it, so that a repeated command goes on with it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from surgery.cli.processes import is_first
from surgery.errors import OptionError

FILE = "train.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of `surgery train` that its numbers depend on.

    passes: as given, or the exact ones. batch: rows of a forward on one process; accumulate of them
    are a step.
    data, evaluation: SHA-256 of the files beside their names. held_out: rows of the data that are
    kept for evaluation, if there is no file for it.
    """

    model: str
    tokenizer: str | None
    task: str
    data: tuple[str, str]
    evaluation: tuple[str, str] | None
    held_out: int
    text_column: str
    label_column: str
    learn: str
    pack: bool | None
    passes: tuple[str, ...]
    steps: int | None
    epochs: float
    batch: int
    accumulate: int
    length: int
    lr: float
    warmup: int
    schedule: str
    optimizer: str
    clip: float | None
    dtype: str
    autocast: str | None
    device: str
    seed: int
    processes: int
    wrap: str


def digest(path: Path) -> tuple[str, str]:
    """Return a file's name and SHA-256. Raises OptionError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return str(path), hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}.") from error


def keep(settings: Settings, folder: Path) -> None:
    """Write the settings into a folder, or see that they are those of the run that it holds.

    Raises OptionError, with what differs.
    """
    path = folder / FILE
    new: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    try:
        if path.exists():
            check(json.loads(path.read_text()), new, folder)
            return
        if is_first():
            folder.mkdir(parents=True, exist_ok=True)
            write(path, json.dumps(new, indent=2) + "\n")
    except OSError as error:
        raise OptionError(f"--out {folder} cannot be used: {error.strerror}.") from error
    except json.JSONDecodeError as error:
        raise OptionError(
            f"{path} has no settings of a run: {error}. Use another --out."
        ) from error


def check(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    """Raise OptionError if two runs are not the same one."""
    differ = [f"{k} was {old.get(k)!r} and is {v!r}" for k, v in new.items() if old.get(k) != v]
    if differ:
        raise OptionError(
            f"{folder} holds another run: {'; '.join(differ)}. Repeat its command to go on with "
            "it, or use another --out."
        )


def write(path: Path, text: str) -> None:
    """Write a file in one piece."""
    made = path.with_name(f".{path.name}.partial")
    made.write_text(text)
    made.replace(path)
