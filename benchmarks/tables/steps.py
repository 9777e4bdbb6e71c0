"""Steps by the clock, on GPUs and CPUs; launches, traffic, long lives."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.cells import by_columns, markdown


def whole_steps(part: dict[str, Any]) -> str:
    """Whole steps on one GPU: time over eager's of the same run, peak, how long Python took."""
    return by_columns(
        part["steps"],
        ("peak", "{peak_gib:.2f} GiB"),
        ("a step", "{ms:.0f} ms"),
        ("over eager", "{over_eager:.2f}x"),
        ("until it is issued", "{host_ms:.0f} ms"),
        ("two steps ready after", "{start_s:.0f} s"),
    )


def gpu_in_short(part: dict[str, Any]) -> str:
    """Whole steps on one GPU, for the README."""
    names = ["eager AdamW", "Liger", "recompute + chunked_loss"]
    names += ["misa 3 % + recompute + chunked_loss", "rso + recompute + chunked_loss"]
    names += ["misa 3 % + chunked_loss + checkpointing", "MeZO as published", "mezo"]
    return by_columns(
        {name: part["steps"][name] for name in names},
        ("peak memory of a step", "{peak_gib:.1f} GiB"),
        ("time of a step", "{over_eager:.2f}x"),
    )


def zeroth(part: dict[str, Any]) -> str:
    """Time and peak bytes of zeroth-order steps."""
    return by_columns(
        part["rows"],
        ("time", "{milliseconds:,.0f} ms"),
        ("over MeZO as published", "{time_over_published:.2f}x"),
        ("over mezo", "{time_over_mezo:.2f}x"),
        ("peak on top of the weights", "{peak_megabytes:,.0f} MB"),
    )


def cost(part: dict[str, Any]) -> str:
    """Time and bytes of methods beside GaLore and LoRA."""

    def once(row: dict[str, Any]) -> str:
        key = "milliseconds_once_in_a_period"
        return f"{row[key]:,.0f} ms" if key in row else ""

    return by_columns(
        part["methods"],
        ("time", "{milliseconds:,.0f} ms"),
        ("over GaLore", "{time_over_galore:.2f}x"),
        ("over LoRA", "{time_over_lora:.2f}x"),
        ("once in a period", once),
        ("peak", "{peak_megabytes:,.0f} MB"),
    )


def overhead(part: dict[str, Any]) -> str:
    """What `apply` alone costs, over eager."""
    rows = {name.replace("_", " "): row for name, row in part.items() if name != "machine"}
    return by_columns(
        rows,
        ("tokens", "{tokens[0]} x {tokens[1]}"),
        ("step", "{step[ratio]:.3f}x"),
        ("forward and backward", "{forward_backward[ratio]:.3f}x"),
        ("forward", "{forward[ratio]:.3f}x"),
        named="model",
    )


def launches(part: dict[str, Any]) -> str:
    """Operations of a step that an accelerator would launch."""
    base = part["eager"]["launches"]
    return by_columns(
        part,
        ("launches", "{launches:,}"),
        ("over eager", lambda row: f"{row['launches'] / base:.2f}x"),
        ("waits for the device", "{waits}"),
    )


def traffic(part: dict[str, Any]) -> str:
    """What is sent between processes in a step."""
    return by_columns(
        part["rows"],
        ("gradients reduced", lambda row: _megabytes(row["reduced_megabytes"])),
        ("over AdamW", "{reduced_over_adamw:.3f}x"),
        (
            "weights gathered in backward and step",
            lambda row: _megabytes(row["gathered_megabytes"]),
        ),
    )


def _megabytes(value: float) -> str:
    return f"{value:,.1f} MB" if value >= 0.05 or not value else f"{1e6 * value:,.0f} bytes"


def soak(part: dict[str, Any]) -> str:
    """What grew in a long life, at its beginning, in its middle and at its end."""
    samples = {sample["actions"]: sample for sample in part["samples"]}
    shown = [samples[at] for at in (800, 4400, 10_000)]
    counted = {
        "distinct structures of inputs, hooks and frozen weights": "structures",
        "captured graphs of the eight models": "captures",
    }
    sized = {
        "optimizer state": ("optimizer_state_bytes", 1),
        "live tensors": ("live_tensor_bytes", 1),
        "allocated by malloc": ("malloc_bytes", 0),
        "resident memory": ("resident_bytes", 0),
    }
    rows = [[name, *(f"{each[key]:,}" for each in shown)] for name, key in counted.items()]
    rows += [
        [name, *(f"{each[key] / 1e6:,.{digits}f} MB" for each in shown)]
        for name, (key, digits) in sized.items()
    ]
    return markdown(["", *(f"after {each['actions']:,} actions" for each in shown)], rows)
