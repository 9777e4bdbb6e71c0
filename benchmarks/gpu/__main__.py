"""Every pass on one GPU, in a script that fits eight minutes: whole steps, correctness, gpu tests.

`python -m benchmarks.gpu [--seconds 480] [--part correctness] [--profile ROW] [ROW ...]`

steps: `rows.py`; one forked process a row; peers that are not installed say so in their row.
correctness: families x passes in float32, bfloat16 and under autocast; the first loss beside
eager's on the device, and in float32 the losses of six steps beside the CPU's. What there is to
compile is compiled before, for several rows at once; rows named `cold` start from empty caches.
`--device cpu --tiny` tries the script on any machine.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

from benchmarks.gpu.correctness import correctness, show
from benchmarks.gpu.measuring import measured
from benchmarks.gpu.processes import in_a_process, warmed
from benchmarks.gpu.rows import ROWS, Setting

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma3", "gpt2", "opt", "mixtral"]
FAMILIES += ["t5", "bert", "roberta", "vit"]
# Of rows with nothing to compile, or that start from empty caches.
PLAIN = ("Liger", "eager AdamW", "MeZO as", "cold", "linear_cross_entropy")


def main(
    rows: Annotated[list[str] | None, typer.Argument(help="of the table; all by default")] = None,
    seconds: int = 480,
    part: Annotated[str, typer.Option(help="correctness, steps or tests; all by default")] = "",
    profile: Annotated[list[str] | None, typer.Option(help="rows: their kernels by time")] = None,
    device: str = "cuda",
    tiny: bool = False,
    at_once: Annotated[int, typer.Option(help="rows compiled at once, before; 0: none")] = 12,
    out: Path = Path("benchmarks/results/gpu.json"),
) -> None:
    """Run the parts, and write what they found after each row."""
    setting, end = Setting(device, tiny), time.time() + seconds
    # In a process of its own: CUDA does not survive the forks of the rows.
    about = in_a_process(torch.cuda.get_device_name, seconds=60) if device == "cuda" else device
    found: dict[str, Any] = {
        "device": about,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }

    def write() -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_suffix(".tmp")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.replace(out)

    if part in ("", "steps"):
        found["steps"] = {}
        names = rows or list(ROWS)
        for name in profile or ():
            names += [] if name in names else [name]
        if at_once:
            ours = [name for name in names if not any(word in name for word in PLAIN)]
            found["compiled before, s"] = warmed(ours, setting, at_once, 90)
            print(f"compiled before in {found['compiled before, s']:.0f} s", flush=True)
        for name in names:
            left = end - time.time() - (170 if not part else 10)
            if left < 0:
                found["steps"][name] = {"error": "no time"}
                continue
            row = in_a_process(measured, name, setting, name in (profile or ()), seconds=left)
            found["steps"][name] = row
            base = found["steps"].get("eager AdamW", {}).get("ms")
            ratio = f"{row['ms'] / base:.2f}x" if base and "ms" in row else ""
            host = f"host {row['host']:.0f} ms" if "host" in row else ""
            peak = f"{row['peak'] / 2**30:.2f} GiB" if "peak" in row else ""
            more = f"{host:>12} waits {row.get('waits')} start {row.get('start')}"
            told = row.get("error", more if peak else row.get("losses"))
            print(f"{name:50} {peak:>10} {ratio:>7} {told} {row.get('where', '')}", flush=True)
            for kernel in row.get("kernels", ())[:14]:
                print("    ", *kernel)
            write()
            gc.collect()
    if part in ("", "correctness"):
        families = rows if part and rows else FAMILIES
        found["correctness"] = correctness(setting, families, end - time.time() - 30)
        show(found["correctness"])
        write()
    if part in ("", "tests"):
        run = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
        left = max(20.0, end - time.time())
        try:
            done = subprocess.run(run, capture_output=True, text=True, timeout=left)
            found["tests"] = done.stdout.strip().splitlines()[-1:]
        except subprocess.TimeoutExpired:
            found["tests"] = ["timed out"]
        print(*found["tests"])
        write()


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
