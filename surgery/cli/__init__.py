"""The command line, one file a command: `surgery list`, `surgery plan MODEL --pass misa`."""

from __future__ import annotations

import typer

from surgery.cli import (
    checking,
    comparing,
    exporting,
    fitting,
    listing,
    planning,
    screen,
    training,
)

app = typer.Typer(
    cls=screen.Commands,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,  # they are tensors
    help="Memory-efficient training by model surgery.",
)
app.command("list")(listing.list_passes)
app.command("plan")(planning.plan_of)
app.command("fit")(fitting.fit_of)
app.command("train")(training.train)
app.command("export")(exporting.export_run)
app.command("diff")(comparing.compare)
app.command("doctor")(checking.check_up)


def main() -> None:
    """Run the command line."""
    app()
