"""Families x passes on a device: the first loss beside eager's, losses beside the CPU's."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import passes
import surgery
from benchmarks.gpu.rows import Setting

SPECS: dict[str, Callable[[], Any]] = {
    "misa": lambda: passes.Misa(budget=0.3, period=2),
    "badam": lambda: passes.BAdam(period=2),
    "recompute": lambda: passes.Recompute(),
    "chunked_loss": lambda: passes.ChunkedLoss(),
    "compress": lambda: passes.Compress(),
    "rso": lambda: passes.Rso(rank=4, period=2),
    "velora": lambda: passes.Velora(groups=4),
    "galore": lambda: passes.Galore(rank=4, period=2),
    "galore, recompute": lambda: [passes.Galore(rank=4, period=2), passes.Recompute()],
    "mezo": lambda: passes.Mezo(),
    "sparse_mezo": lambda: passes.SparseMezo(),
    "lozo": lambda: passes.Lozo(),
    "subzero": lambda: passes.SubZero(rank=4),
    "lisa": lambda: passes.Lisa(layers=1, period=2),
}
MODES = ("float32", "bfloat16", "autocast")


def trained(family: str, name: str | None, mode: str, device: str, steps: int) -> list[float]:
    """Return the losses of a tiny model of a family."""
    from models import (  # pyright: ignore[reportMissingImports] # of tests/
        inputs_of,
        loss_of,
        make,
    )

    torch._dynamo.reset()
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    model = make(family).to(device, dtype).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    config = getattr(model, "config", None)
    for key in ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "dropout_rate"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    if name is not None:
        surgery.apply(model, SPECS[name]())
    forwards = name in ("mezo", "sparse_mezo", "lozo", "subzero")
    kind: Any = torch.optim.SGD if forwards else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=1e-4)
    losses = []
    for seed in range(steps):
        inputs = {k: v.to(device) for k, v in inputs_of(family, seed=seed).items()}
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        with torch.autocast(device, torch.bfloat16, enabled=mode == "autocast"):
            loss = loss_of(model, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def checked(family: str, setting: Setting) -> dict[str, Any]:
    """Return for each pass and mode how far losses are from eager's and from a CPU's."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    found: dict[str, Any] = {}
    for mode in MODES:
        first = trained(family, None, mode, setting.device, 1)[0]
        for name in SPECS:
            if family == "vit" and name == "chunked_loss":
                continue
            try:
                losses = trained(family, name, mode, setting.device, 6)
                entry: dict[str, Any] = {"off": abs(losses[0] - first) / abs(first)}
                if mode == "float32":
                    cpu = trained(family, name, mode, "cpu", 6)
                    entry["cpu"] = max(
                        abs(a - b) / abs(b) for a, b in zip(losses, cpu, strict=True)
                    )
            except Exception as error:
                entry = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
            found[f"{name} {mode}"] = entry
    return found


def correctness(setting: Setting, families: list[str], seconds: float) -> dict[str, Any]:
    """Run `checked` for all families, a process each."""
    context, end = multiprocessing.get_context("spawn"), time.time() + seconds
    with context.Pool(min(len(families), os.cpu_count() or 1)) as pool:
        jobs = {family: pool.apply_async(checked, (family, setting)) for family in families}
        found = {}
        for family, job in jobs.items():
            try:
                found[family] = job.get(max(1.0, end - time.time()))
            except multiprocessing.TimeoutError:
                found[family] = {"error": "timed out"}
        pool.terminate()
    return found


def show(found: dict[str, Any]) -> None:
    for family, rows in found.items():
        wrong = {
            name: entry
            for name, entry in rows.items()
            if not isinstance(entry, dict)
            or "error" in entry
            or entry["off"] > (0.02 if any(w in name for w in ("zo", "zero")) else 1e-3)
            or entry.get("cpu", 0.0) > 0.02
        }
        print(f"{family}: {len(rows) - len(wrong)} of {len(rows)} hold", flush=True)
        for name, entry in wrong.items():
            print(f"    {name}: {entry}")
