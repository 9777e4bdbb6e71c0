"""What every kind of table is written with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

INSIDE = ", checkpointing"  # the end of a row's name


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def by_columns(
    rows: Mapping[str, Mapping[str, Any]],
    *columns: tuple[str, str | Callable[[Any], str]],
    named: str = "",
) -> str:
    """Return a table with a line for each row: its name, and what each column says of it.

    columns: head and cell; a cell is a format over what the row holds, or a function of the row.
    named: the head over the names.
    """

    def cell(told: str | Callable[[Any], str], row: Mapping[str, Any]) -> str:
        return told.format_map(row) if isinstance(told, str) else told(row)

    lines = [[name, *(cell(told, row) for _, told in columns)] for name, row in rows.items()]
    return markdown([named, *(head for head, _ in columns)], lines)


def each(key: str, form: str, times: int = 1) -> Callable[[Any], str]:
    """Return what says all values that a row holds under a key, times a factor."""
    return lambda row: ", ".join(format(times * value, form) for value in row[key])
