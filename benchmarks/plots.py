"""Pictures of the results, for the docs: `python -m benchmarks.plots` draws them from the JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"


@contextmanager
def picture(name: str, size: tuple[float, float], font: int = 8) -> Iterator[Any]:
    """Give the axes of a picture, and write it as an SVG, the same bytes for the same data."""
    # By name: the type checker runs where the `bench` extra is not installed.
    matplotlib: Any = import_module("matplotlib")
    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "surgery", "font.size": font}
    pyplot: Any = import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=size)
    yield axes
    PICTURES.mkdir(exist_ok=True)
    figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)


def scatter(case: str, rows: dict[str, dict[str, Any]]) -> None:
    """Draw bytes alive after forward against time, both over eager, numbered from the fastest;
    names of ours in bold."""
    plain = {name: row for name, row in rows.items() if not name.endswith(", checkpointing")}
    name = case.split(",")[0].lower().replace("-", "_")
    half = "_bfloat16" if "bfloat16" in case else ""
    points = sorted((row["time_over_eager"], row["live_over_eager"], n) for n, row in plain.items())
    with picture(f"activation_memory_{name}{half}", (9, 4.5)) as axes:
        weights = []
        for number, (x, y, row) in enumerate(points, 1):
            other = any(word in row for word in ("peft", "budget", "eager", "adapters"))
            other |= row == "checkpointing"
            weights.append("normal" if other else "bold")
            colour = "tab:gray" if other else "tab:blue"
            axes.scatter(x, y, color=colour, s=16, label=f"{number}  {row}")
            place = {"xytext": (3, 3), "textcoords": "offset points", "weight": weights[-1]}
            axes.annotate(str(number), (x, y), **place)
        legend = axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        for text, weight in zip(legend.get_texts(), weights, strict=True):
            text.set_weight(weight)
        axes.set_xlabel("time of forward and backward over eager")
        axes.set_ylabel("bytes alive after forward over eager")
        axes.set_ylim(bottom=0)
        axes.set_title(case)


def accuracy(task: str, result: dict[str, Any]) -> None:
    """Draw the accuracy of few-shot training against forwards, a line for each method."""
    with picture(f"few_shot_{task.replace(' ', '_')}", (7, 4.5)) as axes:
        for place, (name, row) in enumerate(result["rows"].items()):
            count = len(row["curve"]) - 1
            forwards = [result["forwards"] * i / count for i in range(count + 1)]
            first_order = row["forwards_of_a_step"] == 3
            line = "--" if first_order else "-"
            marker = ".sv"[place // 10]  # there are ten colours
            axes.plot(forwards, row["curve"], line, marker=marker, markersize=5, label=name)
        axes.set_xlabel("forwards (a backward counts as two)")
        axes.set_ylabel(f"accuracy, mean of {len(result['seeds'])} seeds")
        axes.set_title(f"MiniLM on Reuters R8, {task}, {result['shots']} examples of each")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def draw(parts: dict[str, Any]) -> None:
    for name, rows in parts.items():
        if len(rows) > 5 and "time_over_eager" in rows.get("eager", {}):
            scatter(name, rows)


if __name__ == "__main__":
    draw(json.loads((RESULTS / "activation_memory.json").read_text())["parts"])
    for task, result in json.loads((RESULTS / "few_shot.json").read_text())["parts"].items():
        accuracy(task, result)
