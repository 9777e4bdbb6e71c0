"""Reports as tables: what a surgery holds before and after, by what holds it."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from surgery.memory import Bytes, comparison, megabytes
from surgery.prediction.timeline import Holder
from surgery.reports.kept import Kept

LARGEST_KINDS = 12  # rows of a printed report; all are in `Report.kept`


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was done to a model, as text lines, and the bytes before and after; print it.

    before: training all that could be trained before `apply`, with Adam. after: as it is now. kept:
    what forward keeps for backward, by operation, if a batch was given (checkpointed blocks count
    by their inputs). holders: what is alive at the peak that was predicted, the largest first.
    """

    title: str
    lines: tuple[tuple[str, str], ...]
    before: Bytes
    after: Bytes
    measured: bool
    kept: tuple[Kept, ...] = ()
    holders: tuple[Holder, ...] = ()

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
            table.add_row(f"kept, {megabytes(one.bytes)}", f"{what}, for backward of {one.kept_by}")
        if self.holders:
            table.add_section()
        for held in self.holders[:LARGEST_KINDS]:
            table.add_row(f"at the peak, {megabytes(held.bytes)}", str(held))
        return table

    def __str__(self) -> str:
        console = Console(width=100, file=io.StringIO())
        with console.capture() as captured:
            console.print(self)
        return captured.get()
