"""Bytes: what the allocator says, and what follows from shapes alone."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from surgery.compat.tensors import inside, storage_of

T = TypeVar("T")
_LOG = "KINETO_LOG_LEVEL"


@dataclass(frozen=True, kw_only=True)
class Measured(Generic[T]):
    """What a call allocated: `live` bytes still held when it returned, `peak` bytes on the way.

    blocks: on a CPU, the addresses of what it and the calls before it (`after=`) still hold.
    """

    live: int
    peak: int
    result: T
    blocks: frozenset[int] = frozenset()


def measure(
    call: Callable[[], T], device: torch.device, after: Measured[Any] | None = None
) -> Measured[T]:
    """Run a call and ask the allocator (CPU: torch's profiler; CUDA: its statistics).

    On a CPU only what the call itself has taken counts as given back by it, and what was taken by
    the measured call that it comes `after`: of other memory the profiler knows no size, or that of
    an earlier tensor at the same address. It misses what a thread that the call did not start from
    gives back: a collective's, say.
    """
    if device.type == "cuda":
        gc.collect()  # what others have left in circles would count as given back by the call
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        live = torch.cuda.memory_allocated(device) - before
        peak = torch.cuda.max_memory_allocated(device) - before
        return Measured(live=live, peak=peak, result=result)
    with (
        _quiet(),
        profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profiler,
    ):
        result = call()
    live = peak = 0
    blocks = set(after.blocks if after else ())
    for address, change in _allocations(profiler):
        if change > 0:
            blocks.add(address)
        elif address not in blocks:
            continue
        else:
            blocks.remove(address)
        live += change
        peak = max(peak, live)
    return Measured(live=live, peak=peak, result=result, blocks=frozenset(blocks))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the profiler from printing that it starts and stops; it asks once a process."""
    said = os.environ.get(_LOG)
    os.environ[_LOG] = said or "99"
    try:
        yield
    finally:
        if said is None:
            del os.environ[_LOG]


def _allocations(profiler: profile) -> list[tuple[int, int]]:
    """Return the CPU allocator's events in order: an address, and its bytes, negative if freed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    memory.sort(key=lambda event: event["ts"])
    return [(e["args"]["Addr"], e["args"]["Bytes"]) for e in memory]


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """The memory of training, by what holds it; None where it was not measured or predicted.

    peak: the most bytes in use at any time of a step, on the model's device. phase: where the peak
    is reached: "forward", "backward" or "step". milliseconds: the time of a step.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int | None = None
    peak: int | None = None
    phase: str | None = None
    milliseconds: float | None = None

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + (self.activations or 0)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the distinct storages behind the tensors, quantised ones' scales too."""
    plain = (part for t in tensors for part in inside(t))
    storages = {storage_of(t): t.untyped_storage().nbytes() for t in plain}
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


def megabytes(count: int) -> str:
    """Return bytes in words."""
    return f"{count / 1e6:,.1f} MB"


def binary(count: int) -> str:
    """Return bytes in words, of powers of two."""
    if count < 1 << 30:
        return f"{count / (1 << 20):,.2f} MiB"
    return f"{count / (1 << 30):,.2f} GiB"


def table(columns: dict[str, Bytes], title: str) -> Table:
    """Return a rich table of memory, one column each."""
    made = Table(title=title)
    made.add_column("memory")
    for name in columns:
        made.add_column(name, justify="right")
    for kind, cells in rows([*columns.values()]):
        made.add_row(kind, *cells)
    return made


def rows(columns: Sequence[Bytes]) -> Iterator[tuple[str, list[str]]]:
    """Return each kind of memory that all columns know, with its bytes in words."""
    for kind in ("parameters", "gradients", "optimizer", "activations", "total"):
        values = [getattr(column, kind) for column in columns]
        if None not in values:
            yield kind, [megabytes(value) for value in values]
