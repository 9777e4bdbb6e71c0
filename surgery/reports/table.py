"""Reports as tables: what a surgery holds before and after, by what holds it."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from surgery.memory import Bytes, megabytes, rows
from surgery.prediction.timeline import Holder
from surgery.reports.kept import Kept

LABELS = {"parameters": "weights", "optimizer": "optimizer state"}
LARGEST_KINDS = 12  # rows of a printed report; all are in `Report.kept`


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was done to a model, as lines of text, and its memory before and after. Print it.

    before: the memory of training all that could be trained before `apply`, with Adam. after: the
    memory of training now. kept: what forward keeps for backward, by operation, if a batch was
    given (a checkpointed block counts by its inputs). holders: what is alive at the predicted peak,
    the largest first. passes: the names of the passes.
    """

    title: str
    lines: tuple[tuple[str, str], ...]
    before: Bytes
    after: Bytes
    measured: bool
    kept: tuple[Kept, ...] = ()
    holders: tuple[Holder, ...] = ()
    passes: tuple[str, ...] = ()

    def __rich__(self) -> Group:
        parts = [Text(self.title, style="bold"), self._bytes(), _pairs(self.lines)]
        if self.kept:
            said = Text("What forward keeps for backward, the largest first")
            parts += [said, _largest(self.kept)]
        if self.holders:
            said = Text("What is alive at the peak, the largest first")
            parts += [said, _largest(self.holders)]
        return Group(*parts)

    def _bytes(self) -> Table:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("")
        table.add_column("all weights, Adam", justify="right")
        table.add_column(" + ".join(self.passes) or "now", justify="right")
        columns = self.before, self.after
        peaks = any(column.peak is not None for column in columns)
        for kind, cells in rows(columns):
            # The sum is more than any peak: gradients and activations are never all there at once.
            if kind != "total" or not peaks:
                table.add_row(LABELS.get(kind, kind), *cells)
        if peaks:
            table.add_row("peak of a step", *map(_peak, columns), style="bold")
        if any(column.milliseconds is not None for column in columns):
            table.add_row("time of a step", *map(_time, columns))
        return table

    def __str__(self) -> str:
        console = Console(width=100, file=io.StringIO())
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def _pairs(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    for label, value in rows:
        table.add_row(Text(label), Text(value))
    table.add_row()
    return table


def _largest(found: Sequence[Kept | Holder]) -> Table:
    return _pairs((megabytes(each.bytes), str(each)) for each in found[:LARGEST_KINDS])


def _peak(held: Bytes) -> str:
    return "not known" if held.peak is None else f"{megabytes(held.peak)}, in {held.phase}"


def _time(held: Bytes) -> str:
    return "not known" if held.milliseconds is None else f"{held.milliseconds:,.1f} ms"
