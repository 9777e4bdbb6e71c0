"""What every kind of table is written with."""

from __future__ import annotations

INSIDE = ", checkpointing"  # the end of a row's name


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
