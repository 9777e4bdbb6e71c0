"""Bytes: what the allocator says, and what follows from shapes alone."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from surgery.account import Kept, account
from surgery.compilers import name_of_backend
from surgery.coordinates import unique

if TYPE_CHECKING:
    from surgery.state import Surgery


T = TypeVar("T")
LARGEST_KINDS = 12  # rows of a printed report; all are in `Report.kept`


@dataclass(frozen=True, kw_only=True)
class Measured(Generic[T]):
    """What a call allocated: `live` bytes still held when it returned, `peak` bytes on the way."""

    live: int
    peak: int
    result: T


def measure(call: Callable[[], T], device: torch.device) -> Measured[T]:
    """Run a call and ask the allocator (CPU: torch's profiler; CUDA: its statistics)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        live = torch.cuda.memory_allocated(device) - before
        peak = torch.cuda.max_memory_allocated(device) - before
        return Measured(live=live, peak=peak, result=result)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    live = peak = 0
    for change in _allocations(profiler):
        live += change
        peak = max(peak, live)
    return Measured(live=live, peak=peak, result=result)


def _allocations(profiler: profile) -> list[int]:
    """Return the CPU allocator's events in order: bytes taken (positive) and given back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    return [e["args"]["Bytes"] for e in sorted(memory, key=lambda e: e["ts"])]


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Memory of training, by what holds it. None where it was not measured or predicted."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int | None = None

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + (self.activations or 0)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct storages behind the tensors."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of an optimizer's state."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return storage_bytes(value for value in values if isinstance(value, Tensor))


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def loss_of(output: Any) -> Tensor:
    """Return the loss of an output: `.loss`, the tensor itself, or the sum of what it holds."""
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss
    if isinstance(output, Tensor):
        return output.float().sum()
    values = output.values() if hasattr(output, "values") else output
    return sum(
        (v.float().sum() for v in values if isinstance(v, Tensor) and v.requires_grad),
        start=torch.zeros(()),
    )


def measure_training(
    model: nn.Module, batch: dict[str, Any], optimizer: torch.optim.Optimizer
) -> Bytes:
    """Make one training step with the given optimizer, and measure what it holds on the way.

    It is a real step: use an optimizer of lr=0 and weight_decay=0 to leave the weights as they are.
    """
    loss_of(model(**batch)).backward()  # captures, and fills caches that would count as activations
    optimizer.zero_grad()
    forward = measure(lambda: loss_of(model(**batch)), device_of(model))
    forward.result.backward()
    gradients = storage_bytes(p.grad for p in model.parameters() if p.grad is not None)
    optimizer.step()
    optimizer.zero_grad()
    return Bytes(
        parameters=storage_bytes(model.parameters()),
        gradients=gradients,
        optimizer=state_bytes(optimizer),
        activations=forward.live,
    )


# -- the report ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was done to a model, as text lines, and the bytes before and after; print it.

    before: training all that could be trained before `apply`, with Adam. after: as it is now. kept:
    what forward keeps for backward, by operation, if a batch was given (checkpointed blocks count
    by their inputs).
    """

    title: str
    lines: tuple[tuple[str, str], ...]
    before: Bytes
    after: Bytes
    measured: bool
    kept: tuple[Kept, ...] = ()

    def __rich__(self) -> Table:
        table = Table(title=self.title, show_header=False)
        for label, value in self.lines:
            table.add_row(label, value)
        table.add_section()
        for label, value in comparison({"before": self.before, "now": self.after}):
            table.add_row(label, value)
        if self.kept:
            table.add_section()
        for one in self.kept[:LARGEST_KINDS]:
            what = f"{one.count} x {one.made_by} in {one.where or 'the model'}"
            table.add_row(f"kept, {megabytes(one.bytes)}", f"{what}, for {one.kept_by}")
        return table

    def __str__(self) -> str:
        console = Console(width=100, file=io.StringIO())
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def comparison(columns: dict[str, Bytes]) -> list[tuple[str, str]]:
    """Return rows 'kind of memory' -> 'a MB (name), b MB (name)'."""
    rows = []
    for kind in ("parameters", "gradients", "optimizer", "activations"):
        values = {name: getattr(column, kind) for name, column in columns.items()}
        if any(value is None for value in values.values()):
            continue
        rows.append((kind, ", ".join(f"{megabytes(v)} ({name})" for name, v in values.items())))
    return rows


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def table(columns: dict[str, Bytes], title: str) -> Table:
    """Return a rich table of memory, one column each."""
    made = Table(title=title)
    made.add_column("memory")
    for name in columns:
        made.add_column(name, justify="right")
    for kind in ("parameters", "gradients", "optimizer", "activations", "total"):
        values = [getattr(column, kind) for column in columns.values()]
        if None not in values:
            made.add_row(kind, *(megabytes(value) for value in values))
    return made


def report(surgery: Surgery, batch: dict[str, Any] | None) -> Report:
    """Build the report of a surgery; see `surgery.report`."""
    model = surgery.model
    before, after = _predicted(surgery)
    kept: tuple[Kept, ...] = ()
    if batch is not None:
        before, after, kept = _with_activations(surgery, batch, before, after)
    lines: list[tuple[str, str]] = []
    for options, method in zip(surgery.passes, surgery.methods, strict=True):
        lines += [("pass", repr(options)), *method.lines()]
        if method.name in surgery.taken and surgery.backend is None:
            lines.append((f"{method.name} takes away", _taken(surgery.taken[method.name])))
    if surgery.backend is not None:
        lines.append(("compiled by", name_of_backend(surgery.backend)))
    lines += [
        ("optimizer steps", f"{surgery.step:,}"),
        ("skipped steps", f"{surgery.skipped:,} (NaN or infinite gradients)"),
        ("captured graphs", f"{surgery.captures}"),
    ]
    return Report(
        title=f"surgery on {type(model).__name__}",
        lines=tuple(lines),
        before=before,
        after=after,
        measured=batch is not None,
        kept=kept,
    )


def _taken(count: int) -> str:
    return f"{megabytes(count)} kept for backward, at the shapes that were captured"


def _predicted(surgery: Surgery) -> tuple[Bytes, Bytes]:
    weights = [parameter for parameter, required in surgery.flags() if required]
    parameters = storage_bytes(surgery.model.parameters())
    dense = sum(p.numel() * p.element_size() for p in weights)
    active = [p.parameter for p in unique(surgery.pieces) if p.active]
    live = sum(p.numel() * p.element_size() for p in active) if surgery.sites else dense
    held = sum(state_bytes(optimizer) for optimizer in surgery.optimizers)
    return (
        Bytes(parameters=parameters, gradients=dense, optimizer=2 * dense),
        Bytes(parameters=parameters, gradients=live, optimizer=held or 2 * live),
    )


def _with_activations(
    surgery: Surgery, batch: dict[str, Any], before: Bytes, after: Bytes
) -> tuple[Bytes, Bytes, tuple[Kept, ...]]:
    model, device = surgery.model, device_of(surgery.model)
    plain = surgery.dispatch.plain
    with torch.random.fork_rng(), torch.enable_grad():
        surgery.calls, surgery.rehearsal = [], True
        try:
            model(**batch)  # captures
            kept = account(surgery.calls)
            surgery.calls = None
            now = measure(lambda: loss_of(model(**batch)), device).live
        finally:
            surgery.calls, surgery.rehearsal = None, False
        with _as_before(surgery):
            plain(**batch)
            then = measure(lambda: loss_of(plain(**batch)), device).live
    return (
        Bytes(**vars(before) | {"activations": then}),
        Bytes(**vars(after) | {"activations": now}),
        kept,
    )


@contextmanager
def _as_before(surgery: Surgery) -> Any:
    flags = [(parameter, parameter.requires_grad) for parameter, _ in surgery.flags()]
    try:
        for parameter, required in surgery.flags():
            parameter.requires_grad_(required)
        yield
    finally:
        for parameter, required in flags:
            parameter.requires_grad_(required)
