"""Files of text, JSON lines or tables, read into records: one dict of columns a document."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgery.errors import OptionError, listed

TABLES = {".csv": ",", ".tsv": "\t"}


def records_of(path: Path) -> list[dict[str, Any]]:
    """Return the documents of a file.

    .jsonl: an object a line. .csv, .tsv: a row each, by the names of the first line. All else is
    one text. Raises OptionError if the file cannot be read, names the line that is not right, or
    holds nothing.
    """
    try:
        if path.suffix == ".jsonl":
            found = _lines(path)
        elif path.suffix in TABLES:
            with path.open(newline="", encoding="utf-8-sig") as file:
                found = list(csv.DictReader(file, delimiter=TABLES[path.suffix]))
        else:
            text = path.read_text(encoding="utf-8")
            found = [{"text": text}] if text.strip() else []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise OptionError(
            f"{path} cannot be read: {error}. Give text in UTF-8, .jsonl, .csv or .tsv."
        ) from error
    if not found:
        raise OptionError(f"{path} holds nothing to learn from.")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise OptionError(f"{path}, line {number}, is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise OptionError(
                f'{path}, line {number}, is not an object. A line is {{"text": ...}}, '
                '{"prompt": ..., "completion": ...} or {"messages": [...]}.'
            )
        found.append(record)
    return found


def column(records: Sequence[dict[str, Any]], name: str, option: str) -> list[str]:
    """Return a column as text. Raises OptionError, with the columns that there are."""
    for number, record in enumerate(records, 1):
        if record.get(name) in (None, ""):
            has = listed(str(key) for key in record) or "none"
            raise OptionError(
                f"record {number} has no {name!r}; its columns: {has}. Name the column: "
                f'{option}=...; a conversation goes under "messages", or under "prompt" and '
                '"completion".'
            )
    return [str(record[name]) for record in records]
