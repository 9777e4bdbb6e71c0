"""What one row takes: time, peak, how long Python took to issue a step, kernels."""

from __future__ import annotations

import statistics
import time
import warnings
from typing import Any

import torch

from benchmarks.gpu.rows import ROWS, Setting, Step

WARM, TIMED = 2, 6


def measured(name: str, setting: Setting, profile: bool) -> dict[str, Any]:
    """Return what one row takes: `ms`, `peak` bytes, `start` seconds, losses, kernels.

    host: milliseconds until a step has been issued; what is near `ms` waits for Python.
    """
    began = time.time()
    step = ROWS[name](setting)
    losses = [float(step()) for _ in range(WARM)]
    found: dict[str, Any] = {"start": round(time.time() - began, 1)}
    if setting.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        times, issued = [], []
        for _ in range(TIMED):
            begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
            here = time.perf_counter()
            begin.record()
            last = step()
            end.record()
            issued.append((time.perf_counter() - here) * 1e3)
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        found |= {"peak": torch.cuda.max_memory_allocated(), "ms": statistics.median(times)}
        found["host"] = statistics.median(issued)
        found["all ms"] = [round(each, 1) for each in times]
        if "MeZO" not in name:
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                step()
            torch.cuda.set_sync_debug_mode("default")
            found["waits"] = sum("synchronizing" in str(w.message) for w in told)
    else:
        last = step()
    found["losses"] = [*losses, float(last)]
    if profile:
        found["kernels"] = _profiled(step, setting)
    return found


def _profiled(step: Step, setting: Setting) -> list[tuple[str, float, int]]:
    from torch.profiler import ProfilerActivity, profile

    cuda = setting.device == "cuda"
    kind = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[kind]) as record:
        step()
        if cuda:
            torch.cuda.synchronize()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(record.key_averages(), key=lambda e: -getattr(e, key))
    return [(e.key[:80], round(getattr(e, key) / 1e3, 2), e.count) for e in events[:40]]
