"""Reports as tables: what a surgery holds before and after, by what holds it."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from surgery.memory import Bytes, megabytes
from surgery.prediction.timeline import Holder
from surgery.reports.kept import Kept

LARGEST_KINDS = 12  # rows of a printed report; all are in `Report.kept`


KINDS = {
    "weights": "parameters",
    "gradients": "gradients",
    "optimizer state": "optimizer",
    "activations": "activations",
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was done to a model, as text lines, and the bytes before and after; print it.

    before: training all that could be trained before `apply`, with Adam. after: as it is now. kept:
    what forward keeps for backward, by operation, if a batch was given (checkpointed blocks count
    by their inputs). holders: what is alive at the peak that was predicted, the largest first.
    passes: their names.
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
            rows = [(megabytes(one.bytes), str(one)) for one in self.kept[:LARGEST_KINDS]]
            parts += [Text("What forward keeps for backward, the largest first"), _pairs(rows)]
        if self.holders:
            rows = [(megabytes(each.bytes), str(each)) for each in self.holders[:LARGEST_KINDS]]
            parts += [Text("What is alive at the peak, the largest first"), _pairs(rows)]
        return Group(*parts)

    def _bytes(self) -> Table:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("")
        table.add_column("all weights, Adam", justify="right")
        table.add_column(" + ".join(self.passes) or "now", justify="right")
        columns = self.before, self.after
        for label, kind in KINDS.items():
            values = [getattr(column, kind) for column in columns]
            if None not in values:
                table.add_row(label, *map(megabytes, values))
        if any(column.peak is not None for column in columns):
            table.add_row("peak of a step", *map(_peak, columns), style="bold")
        else:  # gradients and activations are never all there at once: more than any peak
            table.add_row("total", *(megabytes(column.total) for column in columns))
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


def _peak(held: Bytes) -> str:
    return "not known" if held.peak is None else f"{megabytes(held.peak)}, in {held.phase}"


def _time(held: Bytes) -> str:
    return "not known" if held.milliseconds is None else f"{held.milliseconds:,.1f} ms"
