"""What a run has measured: a line of JSON a step, and a picture of the loss."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from surgery.cli.processes import is_first
from surgery.cli.settings import write
from surgery.reports.pictures import loss_at

FILE, PICTURE = "metrics.jsonl", "loss.png"


class Metrics:
    """The file of a run, from a step on: what came after it is run, and written, again."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / FILE
        self.lines: list[dict[str, Any]] = []
        if not is_first():
            return
        self.lines = [line for line in lines_of(self.path) if line["step"] <= step]
        write(self.path, "".join(map(_line, self.lines)))

    def add(self, **values: Any) -> None:
        """Append a line, on the first process; what is not a number is null."""
        if not is_first():
            return
        line = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(_line(line))


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file that are whole: a killed process may leave half of one."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values) + "\n"


def picture(lines: list[dict[str, Any]], path: Path) -> bool:
    """Draw the losses over the steps, if there are any; return False without matplotlib."""
    keys = {"training": "loss", "evaluation": "evaluation"}
    found = {
        name: [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        for name, key in keys.items()
    }
    found = {name: points for name, points in found.items() if points}
    if not found:  # stopped before its first step
        return True
    try:
        loss_at(found, path, marked=["evaluation"])
    except ModuleNotFoundError:
        return False
    return True


def memory_of(device: torch.device) -> int | None:
    """Return the most bytes so far: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # not on Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
