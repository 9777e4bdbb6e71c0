"""Reports as tables: what a surgery holds before and after, by what holds it."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from surgery.memory import Bytes
from surgery.reports.kept import Kept

LARGEST_KINDS = 12  # rows of a printed report; all are in `Report.kept`


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was done to a model, as text lines, and the bytes before and after; print it.

    before: training all that could be trained before `apply`, with Adam. after: as it is now. kept:
    what forward keeps for backward, by operation, if a batch was given (checkpointed blocks count
    by their inputs).
    """

    title: str
    lines: tuple[tuple[str, str], ...]
    before: Bytes
    after: Bytes
    measured: bool
    kept: tuple[Kept, ...] = ()

    def __rich__(self) -> Table:
        table = Table(title=self.title, show_header=False)
        for label, value in self.lines:
            table.add_row(label, value)
        table.add_section()
        for label, value in comparison({"before": self.before, "now": self.after}):
            table.add_row(label, value)
        if self.kept:
            table.add_section()
        for one in self.kept[:LARGEST_KINDS]:
            what = f"{one.count} x {one.made_by} in {one.where or 'the model'}"
            table.add_row(f"kept, {megabytes(one.bytes)}", f"{what}, for {one.kept_by}")
        return table

    def __str__(self) -> str:
        console = Console(width=100, file=io.StringIO())
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def comparison(columns: dict[str, Bytes]) -> list[tuple[str, str]]:
    """Return rows 'kind of memory' -> 'a MB (name), b MB (name)'."""
    rows = []
    for kind in ("parameters", "gradients", "optimizer", "activations"):
        values = {name: getattr(column, kind) for name, column in columns.items()}
        if any(value is None for value in values.values()):
            continue
        rows.append((kind, ", ".join(f"{megabytes(v)} ({name})" for name, v in values.items())))
    return rows


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def table(columns: dict[str, Bytes], title: str) -> Table:
    """Return a rich table of memory, one column each."""
    made = Table(title=title)
    made.add_column("memory")
    for name in columns:
        made.add_column(name, justify="right")
    for kind in ("parameters", "gradients", "optimizer", "activations", "total"):
        values = [getattr(column, kind) for column in columns.values()]
        if None not in values:
            made.add_row(kind, *(megabytes(value) for value in values))
    return made
