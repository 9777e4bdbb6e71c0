"""The command line, one file a command: `surgery list`, `surgery plan MODEL --pass misa`."""

from __future__ import annotations

import typer

from surgery.cli import fitting, listing, planning

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Memory-efficient training by model surgery.",
)
app.command("list")(listing.list_passes)
app.command("plan")(planning.plan_of)
app.command("fit")(fitting.fit_of)


def main() -> None:
    """Run the command line."""
    app()
