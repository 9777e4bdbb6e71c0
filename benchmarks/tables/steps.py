"""Steps by the clock, on GPUs and CPUs; launches, traffic, long lives."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.cells import markdown


def whole_steps(part: dict[str, Any]) -> str:
    """Whole steps on one GPU: time over eager's of the same run, peak, how long Python took."""
    rows = [
        [
            name,
            f"{row['peak_gib']:.2f} GiB",
            f"{row['ms']:.0f} ms",
            f"{row['over_eager']:.2f}x",
            f"{row['host_ms']:.0f} ms",
            f"{row['start_s']:.0f} s",
        ]
        for name, row in part["steps"].items()
    ]
    head = ["", "peak", "a step", "over eager", "until it is issued", "two steps ready after"]
    return markdown(head, rows)


def gpu_in_short(part: dict[str, Any]) -> str:
    """Whole steps on one GPU, for the README."""
    names = ["eager AdamW", "Liger", "recompute + chunked_loss"]
    names += ["misa 3 % + recompute + chunked_loss", "rso + recompute + chunked_loss"]
    names += ["misa 3 % + chunked_loss + checkpointing", "MeZO as published", "mezo"]
    rows = [
        [name, f"{row['peak_gib']:.1f} GiB", f"{row['over_eager']:.2f}x"]
        for name in names
        for row in [part["steps"][name]]
    ]
    return markdown(["", "peak memory of a step", "time of a step"], rows)


def zeroth(part: dict[str, Any]) -> str:
    """Time and peak bytes of zeroth-order steps."""
    head = ["", "time", "over MeZO as published", "over mezo", "peak on top of the weights"]
    rows = [
        [
            name,
            f"{row['milliseconds']:,.0f} ms",
            f"{row['time_over_published']:.2f}x",
            f"{row['time_over_mezo']:.2f}x",
            f"{row['peak_megabytes']:,.0f} MB",
        ]
        for name, row in part["rows"].items()
    ]
    return markdown(head, rows)


def cost(part: dict[str, Any]) -> str:
    """Time and bytes of methods beside GaLore and LoRA."""
    head = ["", "time", "over GaLore", "over LoRA", "once in a period", "peak"]
    rows = [
        [
            name,
            f"{row['milliseconds']:,.0f} ms",
            f"{row['time_over_galore']:.2f}x",
            f"{row['time_over_lora']:.2f}x",
            f"{row['milliseconds_once_in_a_period']:,.0f} ms"
            if "milliseconds_once_in_a_period" in row
            else "",
            f"{row['peak_megabytes']:,.0f} MB",
        ]
        for name, row in part["methods"].items()
    ]
    return markdown(head, rows)


def overhead(part: dict[str, Any]) -> str:
    """What `apply` alone costs, over eager."""
    rows = [
        [
            name.replace("_", " "),
            f"{row['tokens'][0]} x {row['tokens'][1]}",
            *(f"{row[what]['ratio']:.3f}x" for what in ("step", "forward_backward", "forward")),
        ]
        for name, row in part.items()
        if name != "machine"
    ]
    return markdown(["model", "tokens", "step", "forward and backward", "forward"], rows)


def launches(part: dict[str, Any]) -> str:
    """Operations of a step that an accelerator would launch."""
    base = part["eager"]["launches"]
    rows = [
        [name, f"{row['launches']:,}", f"{row['launches'] / base:.2f}x", f"{row['waits']}"]
        for name, row in part.items()
    ]
    return markdown(["", "launches", "over eager", "waits for the device"], rows)


def traffic(part: dict[str, Any]) -> str:
    """What is sent between processes in a step."""
    head = ["", "gradients reduced", "over AdamW", "weights gathered in backward and step"]
    rows = [
        [
            name,
            _megabytes(row["reduced_megabytes"]),
            f"{row['reduced_over_adamw']:.3f}x",
            _megabytes(row["gathered_megabytes"]),
        ]
        for name, row in part["rows"].items()
    ]
    return markdown(head, rows)


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
