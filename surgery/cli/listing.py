"""`surgery list`: the registered passes."""

from __future__ import annotations

import inspect

from rich.console import Console
from rich.table import Table

from surgery.catalogue import available
from surgery.contract.registry import registered


def list_passes() -> None:
    """List the registered passes."""
    table = Table("pass", "what it is")
    for name in available():
        module = inspect.getmodule(registered()[name])
        words = (inspect.getdoc(module) or "").splitlines()
        table.add_row(name, words[0] if words else "")
    Console().print(table)
