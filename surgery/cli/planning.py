"""`surgery plan MODEL --pass misa budget=0.01`: memory, from a config alone."""

from __future__ import annotations

import ast
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape

from surgery.errors import OptionError, SurgeryError, extra
from surgery.reports.predicted import plan


def plan_of(
    model: Annotated[str, typer.Argument(help="A hub id or a folder with a config.json.")],
    options: Annotated[list[str] | None, typer.Argument(help="Options of the pass: k=v.")] = None,
    method: Annotated[str, typer.Option("--pass", help="Name of a pass.")] = "misa",
    batch: int = 1,
    length: int = 512,
) -> None:
    """Predict the memory of training, from the config alone: no weights are loaded."""
    console = Console()
    try:
        skeleton = _skeleton(model)
        ids = torch.empty(batch, length, dtype=torch.long, device="meta")
        inputs = {"input_ids": ids, "labels": ids}
        console.print(plan(skeleton, inputs, method, **_parsed(options or [])))
    except (SurgeryError, ModuleNotFoundError) as error:
        said = escape(str(error))  # targets=["..."] and pip's extras are no markup
        console.print(f"[red]{type(error).__name__}[/red]: {said}", highlight=False)
        raise typer.Exit(2) from error


def _skeleton(model: str) -> Any:
    """Return a model without weights."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ModuleNotFoundError as error:
        raise extra("hf", "configs of Hugging Face models are read by transformers") from error
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).train()


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
