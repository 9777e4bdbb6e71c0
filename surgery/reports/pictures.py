"""Pictures of a run, one function each; the kind of file goes by its name: .png, .svg, .pdf."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, get_args

from surgery.errors import OptionError, extra
from surgery.prediction.loop import Step
from surgery.prediction.timeline import Kind

Target = str | os.PathLike[str]
GB = 10**9
# Of each kind of holder the same colour in every picture.
COLOURS: Mapping[Kind, str] = {
    "weights": "tab:blue",
    "optimizer": "tab:cyan",
    "batch": "tab:gray",
    "gradients": "tab:orange",
    "activations": "tab:red",
    "temporaries": "tab:olive",
}
POINTS = 2000  # of a course: more are not seen


class Plotted(Protocol):
    """One composition of `surgery.fit`; its `title`, if it has one, is its name."""

    @property
    def spec(self) -> Any: ...
    @property
    def peak(self) -> int | None: ...
    @property
    def milliseconds(self) -> float | None: ...


def memory(
    steps: Mapping[str, Step], target: Target, measured: Mapping[str, int] | None = None
) -> None:
    """Draw what holds the memory in the course of a step; several steps stand side by side.

    steps: title -> what `surgery.prediction.loop.foresee` has found. measured: title -> the peak of
    a real step. Raises ModuleNotFoundError without matplotlib, OptionError for no steps.
    """
    _some(steps, "steps")
    figure = _figure(5.0 * len(steps), 4.0)
    panels = figure.subplots(1, len(steps), sharey=True, squeeze=False)[0]
    for axes, (title, step) in zip(panels, steps.items(), strict=True):
        course = _thinned(step)
        kinds = [kind for kind in get_args(Kind) if any(held.get(kind) for _, held in course)]
        heights = [[held.get(kind, 0) / GB for _, held in course] for kind in kinds]
        places = range(len(course))
        axes.stackplot(
            places, heights, labels=kinds, colors=[COLOURS[k] for k in kinds], step="pre"
        )
        line = (measured or {}).get(title, step.peak) / GB
        axes.axhline(line, color="black", linewidth=0.8, linestyle=":")
        phases = [phase for phase, _ in course]
        for i, phase in enumerate(phases):
            if phase is not None and (not i or phases[i - 1] != phase):
                axes.axvline(i, color="black", linewidth=0.5)
                axes.annotate(phase, (i, 0), xytext=(2, 2), textcoords="offset points", fontsize=7)
        said = f"{step.peak / GB:.3g} GB, in {step.phase}"
        if title in (measured or {}):
            said += f"; measured: {line:.3g} GB (dotted)"
        axes.set_title(f"{title}\n{said}", fontsize=10)
        axes.set_xlabel("allocations and releases of a step")
        axes.set_xticks([])
        axes.margins(x=0)
    panels[0].set_ylabel("GB")
    panels[-1].legend(loc="upper right", fontsize=7)
    _write(figure, target)


def bytes_against_time(rows: Iterable[Plotted], target: Target) -> None:
    """Draw the peak of each combination against the time of a step, numbered from the fastest.

    Combinations that no other one beats in both are bold. rows: those of `surgery.fit`; rows
    without a peak or a time are left out. Raises ModuleNotFoundError
    without matplotlib, OptionError if none is left.
    """
    points = [
        (row.milliseconds, row.peak / GB, _called(row))
        for row in rows
        if row.peak is not None and row.milliseconds is not None
    ]
    _some(points, "rows with a peak and a time: plan with a device=")
    figure = _figure(9.0, 4.5)
    axes = figure.subplots()
    best, weights = float("inf"), []
    for number, (x, y, name) in enumerate(sorted(points), 1):
        ahead, best = y < best, min(y, best)  # nothing is both faster and smaller
        weights.append("bold" if ahead else "normal")
        colour = "tab:blue" if ahead else "tab:gray"
        axes.scatter(x, y, s=20, color=colour, label=f"{number}  {name}")
        place = {"xytext": (4, 3), "textcoords": "offset points"}
        axes.annotate(str(number), (x, y), **place, fontsize=8, weight=weights[-1])
    legend = axes.legend(
        loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False, handletextpad=0.1
    )
    for text, weight in zip(legend.get_texts(), weights, strict=True):
        text.set_weight(weight)
    axes.set_xlabel("ms of a step")
    axes.set_ylabel("GB at the peak")
    axes.set_ylim(bottom=0)
    _write(figure, target)


def modules_over_rounds(rounds: Sequence[Collection[str]], target: Target) -> None:
    """Draw which modules were trained in which round of `misa`.

    rounds: for each round, the names of the trained weights, `{c.weight for c in
    surgery.coordinates(model) if c.active}` at its start. Raises ModuleNotFoundError without
    matplotlib, OptionError if no module was ever trained.
    """
    names = list(dict.fromkeys(name for each in rounds for name in sorted(each)))
    _some(names, "rounds in which something was trained")
    names.sort(key=_by_number)
    cells = [[float(name in each) for each in rounds] for name in names]
    figure = _figure(7.0, 1.0 + 0.14 * len(names))
    axes = figure.subplots()
    axes.imshow(cells, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    shares = [
        f"{name}  {sum(row) / len(rounds):.0%}" for name, row in zip(names, cells, strict=True)
    ]
    axes.set_yticks(range(len(names)), shares, fontsize=5)
    axes.set_xlabel("round")
    _write(figure, target)


def loss(losses: Mapping[str, Sequence[float]], target: Target, every: int = 1) -> None:
    """Draw the loss of runs over their steps. losses: for each run, one loss every `every` steps.

    Raises ModuleNotFoundError without matplotlib, OptionError for no losses.
    """
    loss_at({n: [(every * (i + 1), v) for i, v in enumerate(r)] for n, r in losses.items()}, target)


def loss_at(
    losses: Mapping[str, Sequence[tuple[int, float]]], target: Target, marked: Collection[str] = ()
) -> None:
    """Draw losses at given steps. losses: for each name, pairs (step, loss). marked: the names
    whose losses are marked with points. Raises what `loss` raises."""
    _some([value for run in losses.values() for value in run], "losses")
    figure = _figure(7.0, 4.0)
    axes = figure.subplots()
    for name, points in losses.items():
        mark = "o" if name in marked else ""
        axes.plot(*zip(*points, strict=True), marker=mark, label=name, linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(fontsize=7)
    _write(figure, target)


def _figure(width: float, height: float) -> Any:
    """Return a figure that no window and no global state knows."""
    try:
        kind: Any = import_module("matplotlib.figure")
    except ModuleNotFoundError as error:
        raise extra("plots", "pictures are drawn by matplotlib") from error
    return kind.Figure(figsize=(width, height), layout="constrained")


def _write(figure: Any, target: Target) -> None:
    path = Path(target)
    partial = path.with_name(f".{path.stem}.part{path.suffix}")
    # Without the day: the same picture is the same bytes.
    about = {"Date": None} if path.suffix == ".svg" else {}
    try:
        figure.savefig(partial, dpi=150, metadata=about)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _some(values: Any, what: str) -> None:
    if not values:
        raise OptionError(f"there is nothing to draw: no {what}.")


def _thinned(step: Step) -> list[tuple[Any, Mapping[Kind, int]]]:
    """Return a course from the beginning of forward, of at most so many points, the largest of each
    stretch."""
    began = next((i for i, (phase, _) in enumerate(step.course) if phase is not None), 0)
    course = step.course[max(0, began - 1) :]
    stretch = max(1, -(-len(course) // POINTS))
    return [
        max(course[i : i + stretch], key=lambda point: sum(point[1].values()))
        for i in range(0, len(course), stretch)
    ]


def _called(row: Plotted) -> str:
    title, spec = getattr(row, "title", None), row.spec
    if title is not None:
        return title
    passes = spec if isinstance(spec, Sequence) and not isinstance(spec, str) else [spec]
    named = [each if isinstance(each, str) else getattr(each, "name", each) for each in passes]
    return " + ".join(map(str, named)) if spec is not None and named else "plain"


def _by_number(name: str) -> list[tuple[bool, int | str]]:
    """Block 10 comes behind block 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else part) for part in name.split(".")]
