"""One complete save in a folder, replaced as a whole: a process may be killed at any moment.

`surgery_config.json` is the record of the save, for people and programs to read. It names the file
that holds the tensors and its checksum. A save writes that file under a name of its own, then
replaces the record, and then takes away the file that the record before named. Nothing is ever
unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from surgery.checkpoints.encoding import decode, encode
from surgery.errors import CheckpointError, listed

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = 1


RECORD, STATE = "surgery_config.json", "surgery_state"


PARTIAL = ".surgery.partial"  # of a folder of what is being written; then host, process, number


KEYS = {"format", "library", "model", "passes", "weights", "coordinates", "sums", "state", "sha256"}


BLOCK = 1 << 22  # bytes hashed at a time


def write(folder: Path, record: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a save: the record, JSON values, and the state, JSON values and tensors nested.

    Raises CheckpointError if it cannot be written; what was there before is then untouched.
    """
    tensors: dict[str, Tensor] = {}
    values = json.dumps(encode(state, "", tensors))
    folder = folder.resolve()
    partial = partial_in(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clear(folder)
        with _alone_in(folder):
            _tidy(folder)
        partial.mkdir()
        save_file(tensors, partial / "state", {"values": values})
        about: dict[str, Any] = {"bytes": (partial / "state").stat().st_size}
        about["sha256"] = _hash(partial / "state")
        # Named by what it holds: nobody else's file is ever in its way, nor it in theirs.
        about["file"] = _named(about["sha256"])
        (partial / "state").chmod(partial.stat().st_mode & 0o666)
        (partial / RECORD).write_text(_sealed({"format": FORMAT} | dict(record) | {"state": about}))
        for file in ("state", RECORD):
            _flush(partial / file)
        with _alone_in(folder):  # another save of the same values bears the same name
            used = _used(folder)
            (partial / "state").replace(folder / about["file"])
            (partial / RECORD).replace(folder / RECORD)
            if used not in (None, about["file"]):
                (folder / used).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not save to {folder}: {error}. A save that was there before is untouched. Free "
            "some space or give a folder that can be written to, and call surgery.save again."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the record and the state of a save, once every byte of both is checked.

    Raises CheckpointError if there is none, or one that is damaged, foreign or of a newer format.
    """
    while True:
        record = read_record(folder)
        try:
            return record, _read_state(folder, record["state"])
        except (FileNotFoundError, CheckpointError):
            if read_record(folder)["state"] == record["state"]:  # else another save took its place
                raise


def _read_state(folder: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    file = folder / about["file"]
    if not file.is_file():
        raise CheckpointError(f"{RECORD} names {file}, which is missing. Use another save.")
    size = file.stat().st_size
    if size != about["bytes"]:
        raise CheckpointError(
            f"{file} has {size:,} bytes, but {about['bytes']:,} were written: it is cut off or not "
            "the file that was saved. Use another save."
        )
    if _hash(file) != about["sha256"]:
        raise CheckpointError(f"{file} has changed since it was saved. Use another save.")
    with safe_open(file, "pt") as opened:
        values = json.loads(opened.metadata()["values"])
        # Copied, to lie as torch lays tensors: else sums over them (LBFGS) have other last bits.
        tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
    return decode(values, tensors)


def read_record(folder: Path) -> dict[str, Any]:
    """Return the checked content of `surgery_config.json`. Raises CheckpointError."""
    file = folder / RECORD
    if not file.is_file():
        others = sorted(each.name for each in folder.glob("*.*")) if folder.is_dir() else []
        there = f" There is {listed(others, 4)}." if others else ""
        raise CheckpointError(
            f"{folder} holds no save of surgery: no {RECORD}.{there} Weights alone are loaded by "
            "from_pretrained, before surgery.apply; pickles (.pt, .bin) are never loaded here."
        )
    try:
        text = file.read_text()
        record = json.loads(text)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {error}. Use another save.") from error
    if not isinstance(record, dict) or not isinstance(record.get("format"), int):
        raise CheckpointError(f"{file} was not written by surgery.save: it has no format number.")
    if record["format"] > FORMAT:
        raise CheckpointError(
            f"{file} is of format {record['format']}, and this library reads up to {FORMAT}. "
            "pip install --upgrade model-surgery"
        )
    unknown, missing = sorted(set(record) - KEYS), sorted(KEYS - set(record))
    if unknown or missing:
        what = f"unknown keys {listed(unknown)}" if unknown else f"no {listed(missing)}"
        raise CheckpointError(f"{file} has {what}: it was changed, or damaged. Use another save.")
    if _sealed(record) != text:
        raise CheckpointError(f"{file} has changed since it was saved. Use another save.")
    return record


def partial_in(folder: Path) -> Path:
    """Return a folder in a folder for what this process writes and is not whole yet."""
    return folder / f"{_here()}.{os.getpid()}.{uuid.uuid4().hex}"


def ended_in(folder: Path) -> Path:
    """Return a name in a folder for what is kept of a write that was ended before it was whole."""
    return folder / f"{_here()}.ended.{uuid.uuid4().hex}"


def clear(folder: Path) -> None:
    """Take away what processes have left that were killed while they wrote."""
    for left in abandoned(folder):
        shutil.rmtree(left, ignore_errors=True)


def abandoned(folder: Path) -> list[Path]:
    """Return the folders in a folder that processes have left which were killed."""
    found = ((left, left.name.split(".")[-2]) for left in folder.glob(f"{_here()}.*"))
    return [left for left, number in found if not number.isdigit() or not _runs(int(number))]


def _here() -> str:
    return f"{PARTIAL}.{platform.node()}"


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other saves from placing files in a folder, or from taking them away.

    The lock is the kernel's, on the folder: it leaves no file, and none of a killed process. Where
    there is no such lock (Windows, some network file systems) two saves at once are not told apart.
    """
    if fcntl is None:
        yield
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system that has none
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _tidy(folder: Path) -> None:
    """Take away states that processes have left which were killed while they saved."""
    unnamed = [*folder.glob(f"{STATE}_*.safetensors")]
    if not any(folder.glob(f"{PARTIAL}.*")):  # of one that saves now, there would be
        used = _used(folder)
        for file in unnamed:  # one of somebody else's does not bear the name of what it holds
            with suppress(FileNotFoundError):  # another save may be tidying too
                if file.name != used and file.name == _named(_hash(file)):
                    file.unlink()


def _runs(process: int) -> bool:
    if os.name == "nt":  # signal 0 is another one there
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _used(folder: Path) -> str | None:
    """Return the file that the record in place names, if there is one that can be read."""
    try:
        return read_record(folder)["state"]["file"]
    except CheckpointError:  # nothing there that a save could spoil
        return None


def _sealed(record: Mapping[str, Any]) -> str:
    content = {key: value for key, value in record.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(content | {"sha256": digest}, indent=1) + "\n"


def _named(digest: str) -> str:
    return f"{STATE}_{digest[:12]}.safetensors"


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _flush(file: Path) -> None:
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
