"""`surgery plan MODEL --pass misa:budget=0.01 --pass recompute`: memory, from a config alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from surgery.cli.given import dtype_of, optimizer_of, passes_of
from surgery.cli.screen import BAD_INPUT, show
from surgery.reports.predicted import plan
from surgery.reports.table import Report

MODEL = typer.Argument(help="A hub id, a folder, or a config.json.")
ROWS = typer.Option(help="Rows.")
TOKENS = typer.Option(help="Tokens of a row.")
AUTOCAST = typer.Option(help="A dtype, for forward.")
CLIP = typer.Option(help="Norm that gradients are clipped to.")
WORLD = typer.Option(help="Processes; what one of them holds is told.")
WRAP = typer.Option(help="What processes share by: fsdp2 or ddp.")
JSON = typer.Option("--json", help="Print JSON.")
PASSES = typer.Option("--pass", help="A pass: misa, or misa:budget=0.01,period=20. Repeat it.")


def plan_of(
    model: Annotated[str, MODEL],
    options: Annotated[list[str] | None, typer.Argument(help="Of a single pass: k=v.")] = None,
    method: Annotated[list[str], PASSES] = ["misa"],  # noqa: B006 - typer copies it
    batch: Annotated[int, ROWS] = 1,
    length: Annotated[int, TOKENS] = 512,
    device: Annotated[str | None, typer.Option(help="Such as h100, or here: its time.")] = None,
    optimizer: Annotated[str, typer.Option(help="Of torch.optim: sgd:momentum=0.9.")] = "adamw",
    autocast: Annotated[str | None, AUTOCAST] = None,
    clip: Annotated[float | None, CLIP] = None,
    world: Annotated[int, WORLD] = 1,
    wrap: Annotated[str, WRAP] = "fsdp2",
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Predict the memory of training, from the config alone; exit code 2 without a peak."""
    shared: Any = wrap
    found = plan(
        model,
        (batch, length),
        passes_of(method, options or ()),
        device=device,
        optimizer=optimizer_of(optimizer),
        autocast=dtype_of(autocast),
        clip=clip,
        world=world,
        wrap=shared,
    )
    show(found, as_object(found) if as_json else None)
    if found.after.peak is None:
        raise typer.Exit(BAD_INPUT)


def as_object(report: Report) -> dict[str, Any]:
    """Return a report as JSON has it; bytes and milliseconds are plain numbers."""
    return {
        "title": report.title,
        "lines": [list(line) for line in report.lines],
        "before": asdict(report.before),
        "after": asdict(report.after),
        "holders": [asdict(holder) for holder in report.holders],
    }
