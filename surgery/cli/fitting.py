"""`surgery fit MODEL --memory 24GiB --device rtx4090`: what fits, from a config alone."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from surgery.errors import SurgeryError
from surgery.reports.fitting import Goal, Row, fit


def fit_of(
    model: Annotated[str, typer.Argument(help="A hub id or a folder with a config.json.")],
    memory: Annotated[
        str | None, typer.Option(help="Such as 24GiB; default: the device's.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as h100 or rtx4090.")] = None,
    goal: Annotated[str, typer.Option(help="full, adapter or forwards.")] = "full",
    batch: int = 1,
    length: int = 512,
) -> None:
    """Say what to turn on so that training fits: every sensible composition, predicted."""
    console = Console()
    try:
        with console.status("playing one step of each composition ...") as status:

            def told(row: Row) -> None:
                status.update(f"{row.title}: {'fits' if row.fits else 'does not fit'} ...")

            wanted: Goal = goal  # pyright: ignore[reportAssignmentType]
            found = fit(model, (batch, length), memory, device=device, goal=wanted, told=told)
    except (SurgeryError, ModuleNotFoundError) as error:
        console.print(f"[red]{type(error).__name__}[/red]: {escape(str(error))}", highlight=False)
        raise typer.Exit(2) from error
    console.print(found)
    if found.best is None:
        raise typer.Exit(1)
