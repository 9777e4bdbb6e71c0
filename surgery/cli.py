"""The command line: `surgery list`, `surgery plan MODEL --pass misa budget=0.01`."""

from __future__ import annotations

import ast
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import surgery
from surgery.errors import OptionError, SurgeryError

app = typer.Typer(add_completion=False, no_args_is_help=True, help=surgery.__doc__)
console = Console()


@app.command("list")
def list_passes() -> None:
    """List the registered passes."""
    from surgery.registry import _PASSES

    table = Table("pass", "what it is")
    for name in surgery.available():
        words = (__import__(_PASSES[name].__module__, fromlist=["x"]).__doc__ or "").splitlines()
        table.add_row(name, words[0] if words else "")
    console.print(table)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A hub id or a folder with a config.json.")],
    options: Annotated[list[str] | None, typer.Argument(help="Options of the pass: k=v.")] = None,
    method: Annotated[str, typer.Option("--pass", help="Name of a pass.")] = "misa",
    batch: int = 1,
    length: int = 512,
) -> None:
    """Predict the memory of training, from the config alone: no weights are loaded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    ids = torch.empty(batch, length, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "labels": ids}
    try:
        console.print(surgery.plan(skeleton.train(), inputs, method, **_parsed(options or [])))
    except SurgeryError as error:
        console.print(f"[red]{type(error).__name__}[/red]: {error}", highlight=False)
        raise typer.Exit(2) from error


def _parsed(options: list[str]) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise OptionError(f"{option!r} is not of the form name=value, such as budget=0.01.")
        try:
            parsed[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed[name] = value
    return parsed


def main() -> None:
    """Run the command line."""
    app()
