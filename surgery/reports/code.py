"""Captured graphs as readable code, before and after the passes have rewritten them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from surgery.catalogue import resolve
from surgery.compat.stage import Stage
from surgery.engine.surgery import Surgery
from surgery.prediction.loop import put_on
from surgery.prediction.sources import Source, batch_for, model_of
from surgery.prediction.timeline import Timeline


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One captured graph; print it to see `after`.

    before, after: its code before and after the passes. Each line that a pass has inserted ends
    with "# <- name of the pass". inserted: the number of nodes that each pass has inserted.
    """

    before: str
    after: str
    inserted: dict[str, int]

    def __str__(self) -> str:
        counts = ", ".join(f"{count} nodes of {name}" for name, count in self.inserted.items())
        return f"# {counts or 'no node of a pass'}\n{self.after}"


def graphs(surgery: Surgery) -> list[Graph]:
    """Return the graphs that are alive."""
    found = []
    for captured in surgery.dispatch.graphs:
        graph = captured.graph()
        if graph is None:
            continue
        bodies = [m for m in graph.named_modules() if isinstance(m[1], GraphModule)]
        inserted: dict[str, int] = {}
        texts = []
        for path, body in bodies:
            signs = {n.name: n.meta["pass"] for n in body.graph.nodes if "pass" in n.meta}
            for name in signs.values():
                inserted[name] = inserted.get(name, 0) + 1
            title = f"# {path}\n" if path else ""
            texts.append(title + _marked(body.code.strip(), signs))
        found.append(
            Graph(before=captured.before.strip(), after="\n\n".join(texts), inserted=inserted)
        )
    return found


def _marked(code: str, signs: dict[str, str]) -> str:
    lines = []
    for line in code.splitlines():
        made = re.match(r"\s*(\w+)(?:\s*:[^=]+)? = ", line)
        sign = signs.get(made[1]) if made else None
        lines.append(f"{line}  # <- {sign}" if sign else line)
    return "\n".join(lines)


def foreseen(model: Source, batch: Mapping[str, Any] | tuple[int, int], spec: Any) -> list[Graph]:
    """Return the graphs that `surgery.graphs` would after a forward, without data or arithmetic.

    model, batch: as `surgery.plan` takes them. Raises what `apply` and the model's forward raise.
    """
    plain, stage = model_of(model), Stage(Timeline(None))
    with put_on(stage, plain, batch_for(plain, batch), resolve(spec, {})) as played:
        copy, inputs, surgery = played
        assert surgery is not None  # `resolve` returns a pass at least
        copy(**inputs)
        return graphs(surgery)
