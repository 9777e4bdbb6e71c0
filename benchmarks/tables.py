"""Tables of the docs, from the results: `python -m benchmarks.tables` writes them in place.

In the docs a table stands under a comment, <!-- table: FILE | PART | KIND -->, or under
<!-- table: FILE | PART | KIND | ROW; ROW --> with some rows only. Figures in sentences:
`benchmarks.figures`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import figures
from benchmarks.common import interval, load

ROOT = Path(__file__).parent.parent
MARK = "<!-- table:"
PLACE = re.compile(
    r"(<!-- table: ([^|>]+) \| ([^|>]+) \| (\w+)(?: \| ([^|>]+))? -->\n)((?:\|.*\n)*)"
)
INSIDE = ", checkpointing"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


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


def only(part: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Return a part with some of its rows, in the order in which they are named."""
    inner = next((each for each in ("rows", "methods", "steps") if each in part), None)
    if inner is not None and isinstance(part[inner], dict):
        return part | {inner: only(part[inner], names)}
    inside = [name + INSIDE for name in names if name + INSIDE in part]
    if "checkpointing" in part and "eager" in names:
        inside.append("checkpointing")
    return {name: part[name] for name in [*names, *inside]}


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


def few_shot(part: dict[str, Any]) -> str:
    """Accuracies of few-shot training."""
    head = ["", "learning rate", "accuracy, each seed", "mean", "at the start"]
    rows = [
        [
            name,
            f"{row['lr']:g}",
            ", ".join(f"{100 * value:.1f}" for value in row["accuracies"]),
            f"{100 * row['accuracy_mean']:.1f} %",
            f"{100 * row['curve'][0]:.1f} %",
        ]
        for name, row in part["rows"].items()
    ]
    return markdown(head, rows)


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


def launches(part: dict[str, Any]) -> str:
    """Operations of a step that an accelerator would launch."""
    base = part["eager"]["launches"]
    rows = [
        [name, f"{row['launches']:,}", f"{row['launches'] / base:.2f}x", f"{row['waits']}"]
        for name, row in part.items()
    ]
    return markdown(["", "launches", "over eager", "waits for the device"], rows)


def _megabytes(value: float) -> str:
    return f"{value:,.1f} MB" if value >= 0.05 or not value else f"{1e6 * value:,.0f} bytes"


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


def losses(part: dict[str, Any]) -> str:
    """Held-out losses of methods, or of the variants of one."""
    shown = part.get("methods") or part["rows"]
    head = ["", "learning rate", "held-out loss, each seed", "mean"]
    rows = [
        [
            name,
            f"{row.get('lr', part.get('lr', 0)):g}",
            ", ".join(f"{value:.3f}" for value in row["held_out_losses"]),
            f"{row['held_out_mean']:.3f}",
        ]
        for name, row in shown.items()
    ]
    return markdown(head, rows)


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


def folding(part: dict[str, Any]) -> str:
    """What becomes of steps in weights of few bits."""
    rates = list(next(iter(part.values())))
    rows = [[name, *(f"{row[rate]:.2f}" for rate in rates)] for name, row in part.items()]
    return markdown(["", *(f"lr {float(rate):g}" for rate in rates)], rows)


def predictions(part: dict[str, Any]) -> str:
    """Predicted peaks of whole steps beside measured ones."""
    rows = [
        [
            name,
            f"{row['predicted_megabytes']:,.2f} MB",
            f"{row['measured_megabytes']:,.2f} MB",
            f"{100 * row['off']:+.2f} %",
            row["phase"],
            f"{row['seconds']:.0f} s",
        ]
        for name, row in part.items()
    ]
    return markdown(["", "predicted", "measured", "off", "the peak is in", "prediction took"], rows)


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


def quality(part: dict[str, Any]) -> str:
    """Peak, time and held-out loss of methods, for the README."""
    rows = [
        [
            name,
            f"{row['peak_megabytes']:,.0f} MB",
            f"{row['time_over_adamw']:.2f}x",
            ", ".join(f"{loss:.2f}" for loss in row["held_out_losses"]),
        ]
        for name, row in part.items()
        if "held_out_losses" in row
    ]
    return markdown(["", "peak", "time of a step", "held-out loss, three seeds"], rows)


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


def training_steps(part: dict[str, Any]) -> str:
    """Bytes and time of whole steps, each beside the row that it is compared with."""
    rows = [
        [
            name,
            f"{row['live_megabytes']:,.1f} MB",
            f"{row['gradient_bytes'] / 1e6:,.1f} MB",
            f"{row['optimizer_bytes'] / 1e6:,.1f} MB",
            f"{row['time_ratio']:.2f}x",
            row["compared_with"],
        ]
        for name, row in part.items()
    ]
    return markdown(["", "live", "gradients", "optimizer state", "time", "over"], rows)


def standing(part: dict[str, Any]) -> str:
    """What stands between steps, what a step adds to it, and its time."""
    rows = [
        [
            name,
            f"{row['weights_megabytes']:,.0f} MB",
            f"{row['optimizer_megabytes']:,.0f} MB",
            f"{row['peak_megabytes']:,.0f} MB",
            f"{row['time_ratio']:.2f}x",
        ]
        for name, row in part["rows"].items()
    ]
    return markdown(["", "weights", "optimizer state", "peak of a step above them", "time"], rows)


def packed(part: dict[str, Any]) -> str:
    """Held-out losses with exact and with packed activations."""
    losses_, means = part["held_out_losses"], part["held_out_mean"]
    rows = [
        [name, ", ".join(f"{loss:.3f}" for loss in each), f"{means[name]:.3f}"]
        for name, each in losses_.items()
    ]
    return markdown(["", "held-out loss, each seed", "mean"], rows)


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


def predictions_gpu(part: dict[str, Any]) -> str:
    """Predicted peaks and times of whole steps on a GPU beside measured ones."""
    rows = [
        [
            name.replace(" | ", ", ").replace("h100", "H100").replace("h200", "H200"),
            f"{row['peak_gib']:.2f} GiB",
            f"{row['measured_gib']:.2f} GiB",
            f"{row['ms']:.0f} ms",
            f"{row['measured_ms']:.0f} ms",
        ]
        for name, row in part.items()
    ]
    return markdown(["", "peak, predicted", "measured", "a step, predicted", "measured"], rows)


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


KINDS: dict[str, Callable[[dict[str, Any]], str]] = {
    function.__name__: function
    for function in (
        activations,
        memory_and_time,
        zeroth,
        few_shot,
        traffic,
        launches,
        fitting,
        head_times,
        head_peaks,
        whole_steps,
        cost,
        losses,
        intervals,
        folding,
        predictions,
        gpu_in_short,
        head_in_short,
        beside_lora,
        quality,
        sampling,
        training_steps,
        packed,
        standing,
        overhead,
        predictions_gpu,
        soak,
        spread,
        best,
    )
}


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


if __name__ == "__main__":
    for page in pages():
        page.write_text(render(page.read_text()))
        print(f"wrote {page.relative_to(ROOT)}")
