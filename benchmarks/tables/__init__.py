"""Tables of the docs, from the results: `python -m benchmarks.tables` writes them in place.

In the docs a table stands under a comment, <!-- table: FILE | PART | KIND -->, or under
<!-- table: FILE | PART | KIND | ROW; ROW --> with some rows only. A kind is a public function of
one of the modules here. Figures in sentences: `benchmarks.figures`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.common import load
from benchmarks.tables import memory, predicted, quality, steps
from benchmarks.tables.cells import INSIDE

ROOT = Path(__file__).parent.parent.parent
MARK = "<!-- table:"
PLACE = re.compile(
    r"(<!-- table: ([^|>]+) \| ([^|>]+) \| (\w+)(?: \| ([^|>]+))? -->\n)((?:\|.*\n)*)"
)
KINDS: dict[str, Callable[[dict[str, Any]], str]] = {
    name: function
    for module in (memory, predicted, quality, steps)
    for name, function in vars(module).items()
    if getattr(function, "__module__", None) == module.__name__ and not name.startswith("_")
}


def only(part: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Return a part with some of its rows, in the order in which they are named."""
    inner = next((each for each in ("rows", "methods", "steps") if each in part), None)
    if inner is not None and isinstance(part[inner], dict):
        return part | {inner: only(part[inner], names)}
    inside = [name + INSIDE for name in names if name + INSIDE in part]
    if "checkpointing" in part and "eager" in names:
        inside.append("checkpointing")
    return {name: part[name] for name in [*names, *inside]}


def render(text: str) -> str:
    """Return a page with its tables and figures as the results have them."""

    def table(found: re.Match[str]) -> str:
        place, file, name, kind, rows, _ = found.groups()
        result = load(file)
        parts = result.get("parts", result)
        part = parts if name == "all" else parts[name]
        return place + KINDS[kind](only(part, rows.split("; ")) if rows else part)

    return figures.fill(PLACE.sub(table, text))


def pages() -> list[Path]:
    """Return the pages that have such tables or figures."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if re.search(f"{MARK}|{figures.MARK}", page.read_text())]
