"""What a surgery has done to a model, measured."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from surgery.compat.dynamo import name_of_backend
from surgery.contract.options import briefly
from surgery.engine.surgery import Surgery
from surgery.engine.unmoved import Unmoved
from surgery.errors import listed
from surgery.memory import Bytes, device_of, loss_of, measure, megabytes, state_bytes
from surgery.reports.holding import bytes_of
from surgery.reports.kept import Kept, account
from surgery.reports.table import Report
from surgery.weights.additions import at_rest


def report(surgery: Surgery, batch: dict[str, Any] | None) -> Report:
    """Build the report of a surgery; see `surgery.report`."""
    decision, dispatch, clock = surgery.decision, surgery.dispatch, surgery.clock
    weights = [parameter for parameter, required in surgery.flags() if required]
    held = sum(state_bytes(optimizer) for optimizer in clock.optimizers)
    before, after = bytes_of(decision, weights, held or None)
    kept: tuple[Kept, ...] = ()
    if batch is not None:
        before, after, kept = _with_activations(surgery, batch, before, after)
    lines: list[tuple[str, str]] = []
    for options, method in zip(decision.passes, decision.methods, strict=True):
        lines += [("pass", briefly(options)), *method.lines()]
        if method.name in dispatch.taken and dispatch.backend is None:
            lines.append((f"saved by {method.name}", _taken(dispatch.taken[method.name])))
    if dispatch.backend is not None:
        lines.append(("compiled by", name_of_backend(dispatch.backend)))
    if clock.idle:
        text = f"{clock.idle:,}: what was trained then was not used, or is frozen"
        lines.append(("forwards without a gradient", text))
    if clock.unmoved.share >= 0.01:
        lines.append(("lost to rounding", _lost(clock.unmoved)))
    unused = surgery.coverage.unused
    if unused:
        lines.append(("unused by every forward", listed(unused)))
    lines.append(("optimizer steps", f"{clock.step:,}"))
    if decision.coordinates:
        skipped = f"{clock.skipped:,}, for NaN or infinite gradients"
        lines.append(("skipped steps", skipped))
    lines += [
        ("captured graphs", f"{dispatch.captures}"),
        *_beside_predicted(surgery, after.activations),
    ]
    return Report(
        title=f"{type(decision.model).__name__} after {clock.step:,} steps: measured",
        lines=tuple(lines),
        before=before,
        after=after,
        measured=batch is not None,
        kept=kept,
        passes=tuple(options.name for options in decision.passes),
    )


def _beside_predicted(surgery: Surgery, activations: int | None) -> Iterator[tuple[str, str]]:
    """Say how far what `surgery.fit` has predicted of this model was right."""
    expected, kept = surgery.expected
    device = device_of(surgery.decision.model)
    if expected is not None and device.type == "cuda" and surgery.clock.step:
        most = torch.cuda.max_memory_allocated(device)  # since the process began, or it was reset
        yield "peak", _beside(expected, most, "the most so far")
    elif expected is not None:
        yield "peak", f"{megabytes(expected)} predicted"
    if kept is not None and activations is not None:
        yield "activations", _beside(kept, activations, "measured")


def _beside(predicted: int, measured: int, how: str) -> str:
    off = measured / max(1, predicted) - 1
    said = f"{megabytes(predicted)} predicted, {megabytes(measured)} {how}"
    if abs(off) <= 0.05:
        return said
    return f"{said}: off by {off:+.0%}, so this batch, or this loop, is not the simulated one"


def _taken(count: int) -> str:
    return f"{megabytes(count)} kept for backward, at the shapes that were captured"


def _lost(unmoved: Unmoved) -> str:
    return (
        f"in step {unmoved.step:,}, {unmoved.share:.0%} of the entries of 16-bit weights that had "
        "a gradient did not move: steps of less than half their last digit are lost. Train float32 "
        "weights under autocast, or by misa, lisa or badam, which step float32 copies"
    )


def _with_activations(
    surgery: Surgery, batch: dict[str, Any], before: Bytes, after: Bytes
) -> tuple[Bytes, Bytes, tuple[Kept, ...]]:
    decision, dispatch = surgery.decision, surgery.dispatch
    model = decision.model
    device, plain = device_of(model), dispatch.plain
    with torch.random.fork_rng(), torch.enable_grad():
        with surgery.clock.rehearsing():
            with dispatch.listening() as calls:
                model(**batch)  # captures
            kept = account(calls)
            gc.collect()  # what it frees meanwhile would count as given back
            now = measure(lambda: loss_of(model(**batch)), device).live
        with _as_before(surgery), at_rest(decision.additions):
            plain(**batch)
            gc.collect()
            then = measure(lambda: loss_of(plain(**batch)), device).live
    return (
        replace(before, activations=then),
        replace(after, activations=now),
        kept,
    )


@contextmanager
def _as_before(surgery: Surgery) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter, _ in surgery.flags()]
    try:
        for parameter, required in surgery.flags():
            parameter.requires_grad_(required)
        yield
    finally:
        for parameter, required in flags:
            parameter.requires_grad_(required)
