"""`surgery list`: the registered passes, by what they save."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from dataclasses import fields
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from surgery.catalogue import available
from surgery.cli.screen import out
from surgery.contract.registry import registered
from surgery.errors import OptionError, near_misses


def list_passes(
    name: Annotated[str | None, typer.Argument(help="A pass: show its options.")] = None,
) -> None:
    """List the passes by what they save, or the options of one."""
    known = available()
    if name is None:
        out().print(_all(known))
    elif name in known:
        out().print(_one(name))
    else:
        raise OptionError(
            f"unknown pass {name!r}.{near_misses(name, known)} Known: {', '.join(known)}."
        )


def _all(known: list[str]) -> Table:
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in known:
        groups[getattr(registered()[name], "saves", ())].append(name)
    table = Table("saves", "pass", "what it is")
    for saves in sorted(groups, key=lambda saves: (-len(saves), saves)):
        for i, name in enumerate(groups[saves]):
            said = _said(inspect.getmodule(registered()[name]))
            first = re.split(r"\.\s", said, maxsplit=1)[0]  # what follows is where it is from
            told = ", ".join(saves) or "not said"
            table.add_row("" if i else told, name, escape(first))
        table.add_section()
    return table


def _one(name: str) -> Table:
    kind: Any = registered()[name]
    table = Table("option", "default", title=name, caption=escape(_said(kind)))
    table.caption_justify = "left"
    for field in fields(kind):
        table.add_row(field.name, escape(repr(getattr(kind(), field.name))))
    return table


def _said(what: object) -> str:
    return inspect.getdoc(what) or ""
