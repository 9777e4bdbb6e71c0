"""What all commands have in common: the two streams, errors for people, and no noise of others."""

from __future__ import annotations

import json
import logging
import warnings
from typing import Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from surgery.cli.processes import is_first
from surgery.errors import SurgeryError, in_a_line

BAD_INPUT, OUT_OF_MEMORY = 2, 3  # exit codes
# Who says things on import or loading that are no user's business: torchao that kernels of other
# machines cannot be loaded, torch that torchao registers enumerations, transformers what is new.
NOISY = ("torchao", "torch.utils._pytree", "transformers", "huggingface_hub")


def out() -> Console:
    """Return the console for what a command was asked for; it follows NO_COLOR and FORCE_COLOR."""
    return Console(quiet=not is_first())


def err() -> Console:
    """Return the console for everything else."""
    return Console(stderr=True, quiet=not is_first())


def show(found: Any, content: Any) -> None:
    """Print what was asked for: as a table, or its content as JSON if that is given."""
    if content is None:
        out().print(found)
    else:
        print(json.dumps(content, indent=2))


class Commands(TyperGroup):
    """Commands whose errors are one red line, with exit code 2 for bad input."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            quieten()
            try:
                return super().invoke(ctx)
            except (SurgeryError, ModuleNotFoundError) as error:
                complain(error)
                raise typer.Exit(BAD_INPUT) from error
            except torch.OutOfMemoryError as error:
                complain(error, *getattr(error, "__notes__", ()))
                raise typer.Exit(OUT_OF_MEMORY) from error


def complain(error: Exception, *more: str) -> None:
    """Print an error in one red line; it is as long as it is."""
    said = in_a_line(" ".join([str(error), *more]))
    # Escaped: targets=["..."] and pip's extras are no markup.
    # Of any process: on the others than the first, it may be theirs alone.
    Console(stderr=True).print(
        f"[red]{type(error).__name__}: {escape(said)}[/red]", highlight=False, soft_wrap=True
    )


def quieten() -> None:
    """Keep other packages' notices off the screen, and give warnings one line each."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (DeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)
    warnings.showwarning = _warn
    try:
        from transformers.utils import logging as theirs
    except ModuleNotFoundError:
        return
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()


def _warn(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    said = in_a_line(str(message))
    err().print(f"[yellow]warning: {escape(said)}[/yellow]", highlight=False, soft_wrap=True)
