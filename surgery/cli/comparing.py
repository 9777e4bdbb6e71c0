"""`surgery diff MODEL --pass recompute`: a model's graphs before and after the passes."""

from __future__ import annotations

import difflib
import re
from typing import Annotated

import typer
from rich.markup import escape

from surgery.cli.given import passes_of
from surgery.cli.planning import MODEL, PASSES, ROWS, TOKENS
from surgery.cli.screen import out
from surgery.errors import OptionError
from surgery.prediction.sources import config_of, model_of
from surgery.reports.code import foreseen

COLOURS = {"+": "green", "-": "red", "@": "cyan"}


def compare(
    model: Annotated[str, MODEL],
    method: Annotated[list[str], PASSES],
    batch: Annotated[int, ROWS] = 1,
    length: Annotated[int, TOKENS] = 16,
    layers: Annotated[int, typer.Option(help="Keep the first layers only; 0: all.")] = 1,
    context: Annotated[int, typer.Option(help="Lines around what differs.")] = 1,
) -> None:
    """Show what passes change in a model's graphs, from the config alone; + is put in."""
    config = config_of(model)
    if layers:
        if not hasattr(config, "num_hidden_layers"):
            raise OptionError(f"--layers {layers}: {model} has no num_hidden_layers. Use 0.")
        config.num_hidden_layers = min(layers, config.num_hidden_layers)
    screen = out()
    for graph in foreseen(model_of(config), (batch, length), passes_of(method)):
        counts = [f"{count} nodes of {name}" for name, count in graph.inserted.items()]
        screen.print(f"[bold]{', '.join(counts) or 'no node of a pass'}[/bold]")
        before, after = (readable(text).splitlines() for text in (graph.before, graph.after))
        for line in list(difflib.unified_diff(before, after, n=context, lineterm=""))[2:]:
            colour = COLOURS.get(line[:1], "default")
            screen.print(f"[{colour}]{escape(line)}[/{colour}]", highlight=False, soft_wrap=True)


def readable(code: str) -> str:
    """Return a graph's code without what frees values, with weights by their names."""
    code = re.sub(r";  (\w+ = )+None", "", code)
    return re.sub(r"\b[lL]_\w+?_((?:modules|parameters|buffers)_\w+?)_\b(?!\w)", _path, code)


def _path(found: re.Match[str]) -> str:
    path = re.sub(r"^modules_|_modules_", "\0", found[1])
    return re.sub(r"_?(parameters|buffers)_", "\0", path).strip("\0").replace("\0", ".")
