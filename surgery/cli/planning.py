"""`surgery plan MODEL --pass misa:budget=0.01 --pass recompute`: memory, from a config alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from surgery.cli.given import dtype_of, optimizer_of, passes_of
from surgery.cli.screen import out
from surgery.reports.predicted import plan
from surgery.reports.table import Report

MODEL = typer.Argument(help="A hub id, a folder, or a config.json.")
PASSES = typer.Option("--pass", help="A pass: misa, or misa:budget=0.01,period=20. Repeat it.")


def plan_of(
    model: Annotated[str, MODEL],
    options: Annotated[list[str] | None, typer.Argument(help="Of a single pass: k=v.")] = None,
    method: Annotated[list[str], PASSES] = ["misa"],  # noqa: B006 - typer copies it
    batch: Annotated[int, typer.Option(help="Rows.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 512,
    device: Annotated[str | None, typer.Option(help="Such as h100: its blocks, its time.")] = None,
    optimizer: Annotated[str, typer.Option(help="Of torch.optim: sgd:momentum=0.9.")] = "adamw",
    autocast: Annotated[str | None, typer.Option(help="A dtype, for forward.")] = None,
    clip: Annotated[float | None, typer.Option(help="Norm that gradients are clipped to.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict the memory of training, from the config alone: no weights are loaded."""
    found = plan(
        model,
        (batch, length),
        passes_of(method, options or ()),
        device=device,
        optimizer=optimizer_of(optimizer),
        autocast=dtype_of(autocast),
        clip=clip,
    )
    if as_json:
        print(json.dumps(as_object(found), indent=2))
    else:
        out().print(found)


def as_object(report: Report) -> dict[str, Any]:
    """Return a report as JSON has it; bytes and milliseconds are plain numbers."""
    return {
        "title": report.title,
        "lines": [list(line) for line in report.lines],
        "before": asdict(report.before),
        "after": asdict(report.after),
        "holders": [asdict(holder) for holder in report.holders],
    }
