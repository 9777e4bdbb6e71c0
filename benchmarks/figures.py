"""Single figures in the sentences of the docs, from the results.

A figure of a sentence stands in front of a comment that says where it comes from,

    0.60<!-- figure: sampling :: methods :: misa 3 % :: time_over_adamw -->x

and keeps as many decimals as it has. `* 100` behind the keys multiplies; `/ KEYS` divides by a
second figure, whose keys take the place of the last ones: `... :: rso :: peak / LoRA :: peak`.
"""

from __future__ import annotations

import re
from typing import Any

from benchmarks.common import load

FIGURE = re.compile(r"(\d[\d,]*(?:\.(\d+))?)<!-- figure: ([^>]+?) -->")
MARK = "<!-- figure:"


def fill(text: str) -> str:
    """Return a page with the figures of its sentences as the results have them."""

    def figure(found: re.Match[str]) -> str:
        decimals = len(found[2] or "")
        return f"{value_of(found[3]):,.{decimals}f}<!-- figure: {found[3]} -->"

    return FIGURE.sub(figure, text)


def value_of(place: str) -> float:
    """Return the number that `FILE :: key :: key` names, multiplied or divided."""
    place, times, factor = place.partition(" * ")
    place, over, other = place.partition(" / ")
    keys = place.split(" :: ")
    value = _found(keys)
    if over:
        last = other.split(" :: ")
        value /= _found([*keys[: len(keys) - len(last)], *last])
    return value * float(factor) if times else value


def _found(keys: list[str]) -> float:
    found: Any = load(keys[0])
    found = found.get("parts", found)
    for key in keys[1:]:
        found = found[int(key)] if isinstance(found, list) else found[key]
    return float(found)
