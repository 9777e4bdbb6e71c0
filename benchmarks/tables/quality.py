"""Losses and accuracies of methods."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from benchmarks.common import interval
from benchmarks.tables.cells import by_columns, each, markdown


def quality(part: dict[str, Any]) -> str:
    """Peak, time and held-out loss of methods, for the README."""
    return by_columns(
        {name: row for name, row in part.items() if "held_out_losses" in row},
        ("peak", "{peak_megabytes:,.0f} MB"),
        ("time of a step", "{time_over_adamw:.2f}x"),
        ("held-out loss, three seeds", each("held_out_losses", ".2f")),
    )


def sampling(part: dict[str, Any]) -> str:
    """Peak, time, learning rate and held-out loss of methods; some were not trained."""
    rows = []
    for name, row in part.items():
        trained = "held_out_losses" in row
        rows.append(
            [
                name,
                f"{row['peak_megabytes']:,.0f} MB",
                f"{row['time_over_adamw']:.2f}x",
                f"{row['lr']:g}" if trained else "",
                ", ".join(f"{loss:.2f}" for loss in row["held_out_losses"])
                if trained
                else "not run",
                f"{row['held_out_mean']:.2f}" if trained else "",
            ]
        )
    head = ["", "peak", "time of a step", "learning rate", "held-out loss, three seeds", "mean"]
    return markdown(head, rows)


def losses(part: dict[str, Any]) -> str:
    """Held-out losses of methods, or of the variants of one."""
    return by_columns(
        part.get("methods") or part["rows"],
        ("learning rate", lambda row: f"{row.get('lr', part.get('lr', 0)):g}"),
        ("held-out loss, each seed", each("held_out_losses", ".3f")),
        ("mean", "{held_out_mean:.3f}"),
    )


def intervals(part: dict[str, Any]) -> str:
    """Means of three seeds, and the interval that holds each mean with 95 %."""
    rows = []
    for name, row in (part.get("methods") or part.get("rows") or part).items():
        values = row.get("held_out_losses") or row.get("accuracies")
        if values is None:  # not trained
            continue
        low, high = interval(values)
        peak = f"{row['peak_megabytes']:,.0f} MB" if "peak_megabytes" in row else ""
        rows.append(
            [name, f"{fmean(values):.3f}", f"{low:.3f} to {high:.3f}", *([peak] * bool(peak))]
        )
    head = ["", "mean of three seeds", "95 % interval"]
    return markdown(head + ["peak"] * (len(rows[0]) - 3), rows)


def few_shot(part: dict[str, Any]) -> str:
    """Accuracies of few-shot training."""
    return by_columns(
        part["rows"],
        ("learning rate", "{lr:g}"),
        ("accuracy, each seed", each("accuracies", ".1f", 100)),
        ("mean", lambda row: f"{100 * row['accuracy_mean']:.1f} %"),
        ("at the start", lambda row: f"{100 * row['curve'][0]:.1f} %"),
    )


def packed(part: dict[str, Any]) -> str:
    """Held-out losses with exact and with packed activations."""
    losses_, means = part["held_out_losses"], part["held_out_mean"]
    rows = [
        [name, ", ".join(f"{loss:.3f}" for loss in each), f"{means[name]:.3f}"]
        for name, each in losses_.items()
    ]
    return markdown(["", "held-out loss, each seed", "mean"], rows)


def folding(part: dict[str, Any]) -> str:
    """What becomes of steps in weights of few bits."""
    rates = list(next(iter(part.values())))
    rows = [[name, *(f"{row[rate]:.2f}" for rate in rates)] for name, row in part.items()]
    return markdown(["", *(f"lr {float(rate):g}" for rate in rates)], rows)


LONG = (  # columns of all long runs
    ("learning rate", "{lr:g}"),
    ("mean of three seeds", "{held_out_mean:.3f}"),
    ("95 % interval", "{interval[0]:.3f} to {interval[1]:.3f}"),
)


def pretrained(part: dict[str, Any]) -> str:
    """Losses from scratch with their intervals, peaks and times."""
    return by_columns(
        part["rows"],
        *LONG,
        ("peak", "{peak_megabytes:,.0f} MB"),
        ("a step", "{milliseconds_a_step:,.0f} ms"),
    )


def finetuned(part: dict[str, Any]) -> str:
    """Losses with their intervals, what other text has lost, and the least memory of each."""
    return by_columns(
        part["rows"],
        *LONG,
        ("loss on other text", "{forgotten:+.3f}"),
        ("least peak, of AdamW's", lambda row: f"{100 * row['smallest_share']:.0f} %"),
    )
