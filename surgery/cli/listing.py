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
        out().print(_one(name) if fields(registered()[name]) else f"{name}: no options.")
    else:
        raise OptionError(
            f"unknown pass {name!r}.{near_misses(name, known)} Known: {', '.join(known)}."
        )


def _all(known: list[str]) -> Table:
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in known:
        saves = getattr(registered()[name], "saves", ("not said",))
        groups[saves or ("nothing",)].append(name)
    table = Table("saves", "pass", "what it is")
    for saves in sorted(groups, key=lambda saves: (-len(saves), saves)):
        for i, name in enumerate(groups[saves]):
            said = _said(inspect.getmodule(registered()[name]))
            first = re.split(r"\.\s", said, maxsplit=1)[0]  # what follows is where it is from
            table.add_row("" if i else ", ".join(saves), name, escape(first))
        table.add_section()
    return table


def _one(name: str) -> Table:
    kind: Any = registered()[name]
    said = explained(kind)
    table = Table("option", "default", "what it is", title=name)
    for field in fields(kind):
        default = escape(repr(getattr(kind(), field.name)))
        table.add_row(field.name, default, escape(said.get(field.name, "")))
    return table


def explained(kind: Any) -> dict[str, str]:
    """Return what the docstrings of an options class and its bases say of each option.

    They say it as "name: text. other: text."; a text ends where the next option's begins.
    """
    names = "|".join(field.name for field in fields(kind))
    found = {"seed": "the seed of all random draws"}
    for base in reversed(kind.__mro__):
        said = " ".join((inspect.cleandoc(vars(base).get("__doc__") or "")).split())
        _, *parts = re.split(rf"(?:^|(?<=\. ))({names}): ", said)
        found |= {
            name: text.strip(" .") for name, text in zip(parts[::2], parts[1::2], strict=True)
        }
    return found


def _said(what: object) -> str:
    return inspect.getdoc(what) or ""
