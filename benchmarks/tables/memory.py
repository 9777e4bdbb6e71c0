"""Bytes and time of activations, heads and whole training steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.tables.cells import INSIDE, by_columns, markdown


def activations(part: dict[str, Any]) -> str:
    """Live and peak bytes and time, each also inside checkpointing."""
    timed = "time_over_eager" in part["eager"]
    inside = {name.removesuffix(INSIDE): row for name, row in part.items() if name.endswith(INSIDE)}
    inside |= {"eager": part["checkpointing"]} if "checkpointing" in part else {}
    head = ["", "live", "over eager", "peak", *(["time"] if timed else [])]
    if inside:
        head += ["inside checkpointing: live", "peak", *(["time"] if timed else [])]
    rows = []
    for name, row in part.items():
        if name.endswith(INSIDE) or name == "checkpointing":
            continue
        cells = [name, *_cells(row, timed, over=True)]
        if inside:
            cells += _cells(inside[name], timed) if name in inside else [""] * (2 + timed)
        rows.append(cells)
    return markdown(head, rows)


def _cells(row: dict[str, Any], timed: bool, over: bool = False) -> list[str]:
    live, peak = f"{row['live_megabytes']:,.1f} MB", f"{row['peak_megabytes']:,.0f} MB"
    cells = [live, *([f"{row['live_over_eager']:.2f}x"] if over else []), peak]
    return cells + ([f"{row['time_over_eager']:.2f}x"] if timed else [])


def memory_and_time(part: dict[str, Any]) -> str:
    """What is saved for backward, peak and time, for the pages of passes."""
    rows = [
        [
            name,
            f"{row['live_megabytes']:,.0f} MB",
            f"{row['peak_megabytes']:,.0f} MB",
            *([f"{row['time_over_eager']:.2f}x"] if "time_over_eager" in row else []),
        ]
        for name, row in part.items()
        if not name.endswith("checkpointing")
    ]
    head = [
        "",
        "held after forward",
        "peak",
        *(["time of forward and backward"] * (len(rows[0]) - 3)),
    ]
    return markdown(head, rows)


def beside_lora(part: dict[str, Any]) -> str:
    """Activation memory of compositions beside LoRA with the same exact passes, for the README."""
    head = ["", "peak", "time", "with gradient checkpointing: peak", "time"]
    names = ["eager", "LoRA r=16 (peft)", "velora + recompute + chunked_loss on LoRA"]
    names += ["recompute + chunked_loss", "recompute + chunked_loss + velora"]
    names += ["misa 3 % + recompute + chunked_loss + compress 8"]
    rows = []
    for name in names:
        inside = part["checkpointing" if name == "eager" else f"{name}{INSIDE}"]
        cells = [
            cell
            for row in (part[name], inside)
            for cell in (f"{row['peak_megabytes']:,.0f} MB", f"{row['time_over_eager']:.2f}x")
        ]
        rows.append([name, *cells])
    return markdown(head, rows)


def head_times(part: dict[str, Any]) -> str:
    """Times of head and loss, over eager's."""
    return _losses(part, lambda way: f"{way['ratio']:.2f}x")


def head_peaks(part: dict[str, Any]) -> str:
    """Peaks of head and loss, and over eager's."""
    over = {name: way["eager"] for name, way in part.items()}
    rows = {
        name: {k: f"{v / 1e6:,.0f} MB ({v / over[name]:.2f}x)" for k, v in ways.items()}
        for name, ways in part.items()
    }
    return _losses(rows, str)


def head_in_short(part: dict[str, Any]) -> str:
    """Peaks of head and loss at Llama-3's vocabulary, for the README."""
    names = ["cross entropy", "DPO pair", "KL distillation"]
    rows = [
        [name, f"{way['eager'] / 1e9:.1f} GB", f"{way['chunked_loss'] / 1e9:.1f} GB"]
        for name in names
        for way in [part[f"128256 x 1024, float32 | {name}"]]
    ]
    return markdown(["", "plain", "chunked_loss"], rows)


def _losses(part: dict[str, Any], told: Callable[[Any], str]) -> str:
    ways = list(dict.fromkeys(way for row in part.values() for way in row))
    head = ["classes x width, dtype", "loss", *ways]
    rows = [
        [*name.split(" | "), *(told(row[way]) if way in row else "" for way in ways)]
        for name, row in part.items()
    ]
    return markdown(head, rows)


def training_steps(part: dict[str, Any]) -> str:
    """Bytes and time of whole steps, each beside the row that it is compared with."""
    return by_columns(
        part,
        ("live", "{live_megabytes:,.1f} MB"),
        ("gradients", lambda row: f"{row['gradient_bytes'] / 1e6:,.1f} MB"),
        ("optimizer state", lambda row: f"{row['optimizer_bytes'] / 1e6:,.1f} MB"),
        ("time", "{time_ratio:.2f}x"),
        ("over", "{compared_with}"),
    )


def standing(part: dict[str, Any]) -> str:
    """What stands between steps, what a step adds to it, and its time."""
    return by_columns(
        part["rows"],
        ("weights", "{weights_megabytes:,.0f} MB"),
        ("optimizer state", "{optimizer_megabytes:,.0f} MB"),
        ("peak of a step above them", "{peak_megabytes:,.0f} MB"),
        ("time", "{time_ratio:.2f}x"),
    )
