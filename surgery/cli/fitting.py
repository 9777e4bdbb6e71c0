"""`surgery fit MODEL --memory 24GiB --device rtx4090`: what to turn on, from a config alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from surgery.cli.given import dtype_of, optimizer_of
from surgery.cli.planning import AUTOCAST, CLIP, JSON, MODEL, ROWS, TOKENS, WORLD, WRAP
from surgery.cli.screen import err, show
from surgery.errors import OptionError
from surgery.reports.fitting import Fit, Row, fit


def fit_of(
    model: Annotated[str, MODEL],
    memory: Annotated[str | None, typer.Option(help="Such as 24GiB; or the device's.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as h100, or here.")] = None,
    goal: Annotated[str, typer.Option(help="full, adapter or forwards.")] = "full",
    batch: Annotated[int, ROWS] = 1,
    length: Annotated[int, TOKENS] = 512,
    optimizer: Annotated[str | None, typer.Option(help="Such as sgd:momentum=0.9.")] = None,
    autocast: Annotated[str | None, AUTOCAST] = None,
    clip: Annotated[float | None, CLIP] = None,
    world: Annotated[int, WORLD] = 1,
    wrap: Annotated[str, WRAP] = "fsdp2",
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Say what to turn on so that training fits; exit code 1 if nothing does."""
    if memory is None and device is None:
        raise OptionError("say how much memory there is: --memory 24GiB, or --device rtx4090.")
    with err().status("playing a step of each composition ...") as status:

        def told(row: Row) -> None:
            status.update(f"{row.title}: {'fits' if row.fits else 'does not fit'} ...")

        wanted: Any = goal
        shared: Any = wrap
        found = fit(
            model,
            (batch, length),
            memory,
            device=device,
            goal=wanted,
            optimizer=None if optimizer is None else optimizer_of(optimizer),
            autocast=dtype_of(autocast),
            clip=clip,
            world=world,
            wrap=shared,
            told=told,
        )
    show(found, as_object(found) if as_json else None)
    if found.best is None:
        raise typer.Exit(1)


def as_object(found: Fit) -> dict[str, Any]:
    """Return what was found as JSON has it."""
    best = None if found.best is None else asdict(found.best) | {"lines": found.best.lines}
    return {
        "title": found.title,
        "memory": found.memory,
        "rows": [asdict(row) for row in found.rows],
        "best": best,
        "nearest": asdict(found.nearest),
    }
