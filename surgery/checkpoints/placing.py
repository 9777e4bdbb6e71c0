"""The files of an export put into a folder that may hold others: what is not ours stays.

The model card lists the files of an export with their bytes. The next one takes those away, and no
others, that it does not replace. The card is put in place last: a process that is killed before
leaves it in the folder of what it was writing; what it lists and is not there any more was placed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path
from typing import Any

from torch import nn

from surgery.checkpoints.folder import abandoned, ended_in
from surgery.contract.options import to_json
from surgery.engine.surgery import Surgery
from surgery.errors import CheckpointError

CARD = "README.md"
BESIDE = "SURGERY.md"  # the card, where the folder has a README of somebody's own

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MARK = "trained by model surgery"
_FILE = re.compile(r"^\| `(.+)` \| ([\d,]+) \|$", re.MULTILINE)


def place(made: Path, folder: Path) -> None:
    """Put the files of a finished export in place: the weights as one, before what names them.

    At any moment the folder holds a whole checkpoint, the old one or the new one. Raises
    CheckpointError, before anything is changed, if weights that are not of an export would be
    loaded in place of the new ones.
    """
    old = list(dict.fromkeys([*written(folder), *_placed_by_killed(folder)]))
    foreign = (folder / SINGLE).exists() and SINGLE not in old
    if foreign and not (made / SINGLE).exists():
        raise CheckpointError(
            f"{folder / SINGLE} was not written by surgery.export, and would be loaded in place of "
            "the shards that are written now. Move it away, export into another folder, or give "
            "max_shard_size= above the size of the model."
        )
    _set_apart(made, folder)
    files = sorted(str(file.relative_to(made)) for file in made.rglob("*") if file.is_file())
    listed = [each for each in files if each != CARD]
    listing = "".join(_row(each, (made / each).stat().st_size) for each in listed)
    with (made / CARD).open("a") as card:
        card.write(f"\n| file | bytes |\n|---|---|\n{listing}")
    for each in files:  # safetensors lets nobody else read what it writes
        (made / each).chmod(made.stat().st_mode & 0o666)
    if not folder.exists():
        made.rename(folder)
        return
    for file in sorted(listed, key=_order):
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        (made / file).replace(target)
    for file in old:
        if file not in files:
            (folder / file).unlink(missing_ok=True)
            _take_empty(folder, (folder / file).parent)
    (made / CARD).replace(folder / (CARD if _is_ours(folder / CARD) else BESIDE))


def abandon(made: Path) -> None:
    """Take away an export that was not finished, but for the names of what it has placed."""
    folder = made.parent
    placed = {file: (folder / file).stat().st_size for file in _placed(made)}
    listing = made / "listing"
    with suppress(OSError):  # a full disk, of which the export's own error tells
        if placed:
            listing.write_text("".join(map(_row, placed, placed.values())))
            listing.replace(made / CARD)
            for each in sorted(made.rglob("*"), reverse=True):
                if each != made / CARD:
                    each.rmdir() if each.is_dir() else each.unlink()
            made.rename(ended_in(folder))
            return
    shutil.rmtree(made, ignore_errors=True)


def _placed_by_killed(folder: Path) -> list[str]:
    return [file for made in abandoned(folder) for file in _placed(made)]


def _placed(made: Path) -> list[str]:
    """Return the files that an export has put in place before it was ended."""
    return [file for file in _named_by(made / CARD, made.parent) if not (made / file).exists()]


def _row(file: str, size: int) -> str:
    return f"| `{file}` | {size:,} |\n"


def _set_apart(made: Path, folder: Path) -> None:
    """Give shards names that no file in the folder has: the index that names them replaces them
    all at once."""
    shards = [each.name for each in made.glob("*.safetensors") if each.name != SINGLE]
    if not any((folder / each).exists() for each in shards):
        return
    letters = chain("bcdefg", (f"g{number}" for number in count()))  # killed ones leave theirs
    letter = next(c for c in letters if not any((folder / _named(s, c)).exists() for s in shards))
    for each in shards:
        (made / each).rename(made / _named(each, letter))
    index = json.loads((made / INDEX).read_text())
    index["weight_map"] = {k: _named(file, letter) for k, file in index["weight_map"].items()}
    (made / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _named(shard: str, letter: str) -> str:
    return shard.replace("model-", f"model-{letter}-", 1)


def _order(file: str) -> tuple[bool, bool, str]:
    """Weights first, then what names them, then all else."""
    return not file.endswith(".safetensors"), file != INDEX, file


def _take_empty(folder: Path, inner: Path) -> None:
    while inner != folder and not any(inner.iterdir()):
        inner.rmdir()
        inner = inner.parent


def _is_ours(file: Path) -> bool:
    return not file.exists() or _MARK in file.read_text(errors="replace")


def written(folder: Path) -> list[str]:
    """Return the files of an earlier export that are as it wrote them."""
    cards = [folder / name for name in (CARD, BESIDE)]
    return [file for card in cards if _is_ours(card) for file in _named_by(card, folder)]


def _named_by(card: Path, folder: Path) -> list[str]:
    """Return the files in a folder that a card lists, and that have the bytes which it says."""
    found: list[str] = []
    if card.is_file():
        for each, size in _FILE.findall(card.read_text(errors="replace")):
            there = folder / each
            inside = there.resolve().is_relative_to(folder.resolve())
            if inside and there.is_file() and there.stat().st_size == int(size.replace(",", "")):
                found.append(each)
    return found


def card(model: nn.Module, surgery: Surgery) -> str:
    """Return the model card: what trained this, with which options."""
    name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    passes = [to_json(options) for options in surgery.decision.passes]
    tags = "\n".join(f"- {each}" for each in ["model-surgery", *(p["name"] for p in passes)])
    return "\n".join(
        [
            "---",
            "library_name: transformers" if hasattr(model, "config") else "library_name: pytorch",
            f"tags:\n{tags}",
            "---",
            "",
            f"# {Path(name).name}, {_MARK}",
            "",
            f"{surgery.clock.step} optimizer steps with model-surgery {version('model-surgery')}:",
            "",
            *_rows(passes),
            "",
            "The checkpoint is a plain one: it is loaded without the library.",
            "",
        ]
    )


def _rows(passes: Iterable[dict[str, Any]]) -> Iterator[str]:
    yield "| pass | options |"
    yield "|---|---|"
    for each in passes:
        options = ", ".join(f"{key}={value!r}" for key, value in each["options"].items())
        yield f"| {each['name']} | {options} |"
