"""What `plan` and `fit` predict, alone or beside what was measured."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.cells import by_columns, markdown


def predictions(part: dict[str, Any]) -> str:
    """Predicted peaks of whole steps beside measured ones."""
    return by_columns(
        part,
        ("predicted", "{predicted_megabytes:,.2f} MB"),
        ("measured", "{measured_megabytes:,.2f} MB"),
        ("off", lambda row: f"{100 * row['off']:+.2f} %"),
        ("the peak is in", "{phase}"),
        ("prediction took", "{seconds:.0f} s"),
    )


def predictions_gpu(part: dict[str, Any]) -> str:
    """Predicted peaks and times of whole steps on a GPU beside measured ones."""

    def shown(name: str) -> str:
        return name.replace(" | ", ", ").replace("h100", "H100").replace("h200", "H200")

    return by_columns(
        {shown(name): row for name, row in part.items()},
        ("peak, predicted", "{peak_gib:.2f} GiB"),
        ("measured", "{measured_gib:.2f} GiB"),
        ("a step, predicted", "{ms:.0f} ms"),
        ("measured", "{measured_ms:.0f} ms"),
    )


def spread(part: dict[str, Any]) -> str:
    """How far predictions of peaks are off, over all runs."""
    off = sorted(100 * abs(row["off"]) for rows in part.values() for row in _runs(rows))
    near = sum(each < 0.1 for each in off)
    row = [f"{len(off)}", f"{off[len(off) // 2]:.3f} %", f"{near}", f"{off[-1]:.2f} %"]
    return markdown(
        ["runs", "half are off by less than", "off by less than 0.1 %", "largest"], [row]
    )


def _runs(rows: Any) -> list[dict[str, Any]]:
    found = rows.values() if isinstance(rows, dict) else []
    return [row for row in found if isinstance(row, dict) and "off" in row]


def fitting(part: dict[str, Any]) -> str:
    """Peaks of compositions, and the longest row that fits into each memory."""
    memories = [*part["best"]]
    head = [
        "",
        "peak",
        "time",
        *(f"row in {m.replace('GiB', ' GiB')}" for m in memories),
        "training",
    ]
    rows = []
    for name, row in part["rows"].items():
        longest = [f"{n:,}" if (n := row["longest"][m]) else "no" for m in memories]
        chosen = [m for m in memories if name in part["best"][m]]
        for memory in chosen:
            longest[memories.index(memory)] = f"**{longest[memories.index(memory)]}**"
        cells = [f"{row['peak_gib']:.1f} GiB", f"{row['time_over_eager']:.2f}x"]
        what = (
            row["quality"].removeprefix("another method: ").replace("the same gradients", "exact")
        )
        rows.append([name, *cells, *longest, what])
    return markdown(head, rows)


def best(part: dict[str, Any]) -> str:
    """What `fit` recommends in each memory, and the longest row that fits there."""
    ways = ["by backward", "by forward passes alone"][: len(next(iter(part["best"].values())))]
    rows = []
    for memory, names in part["best"].items():
        found = [
            "nothing fits" if name is None else f"{name}: {part['rows'][name]['longest'][memory]:,}"
            for name in names
        ]
        rows.append([memory.replace("GiB", " GiB"), *found])
    return markdown(["your GPU", *(f"{way}: longest row, in tokens" for way in ways)], rows)
