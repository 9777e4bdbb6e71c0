"""What a device can do: two ceilings, and the price of a launch, there and on its host."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from surgery.errors import OptionError, near_misses

# Of two hosts (host_ms in benchmarks/results/gpu_runs.json): an H100's launched a step of eager
# AdamW, of 1,893 operations, in 114 ms; an H200's a step of mezo, of 331 and 746 calls, in 139,
# which is the least for a call of four rows. Hosts differ.
_HOST = 60e-6
_CALL = 160e-6


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of device.

    memory: bytes. bandwidth: bytes a second. half, single: floating-point operations a second of
    dense products of 16-bit and float32 numbers, as the maker says. launch: seconds between two
    kernels, at least. host, call: seconds of the host for an operation, and for a call of what is
    compiled; 0 where the host is the device. block: bytes that the allocator rounds up to.
    workspace: bytes that it holds for the libraries of products. reached: share of the ceilings
    that real kernels reach.
    """

    name: str
    memory: int
    bandwidth: float
    half: float
    single: float
    launch: float = 5e-6
    host: float = _HOST
    call: float = _CALL
    block: int = 512
    workspace: int = 8 << 20
    reached: tuple[float, float] = (0.68, 0.68)

    @property
    def accelerator(self) -> bool:
        return self.block > 1

    def seconds(self, flops: int, dtype: torch.dtype, traffic: int) -> float:
        """Return the time of one operation: the larger of arithmetic and traffic."""
        rate = self.half if dtype.itemsize == 2 else self.single
        product, stream = self.reached
        return max(self.launch, flops / (rate * product), traffic / (self.bandwidth * stream))


_GB = 10**9
_T = 10**12
# Dense, from the makers' data sheets: H100 SXM5 and A100 SXM4 80 GB (float32 products in TF32 are
# not torch's default), L40S, RTX 4090 and 3090 (16 bits added into float32), T4.
KNOWN = {
    each.name: each
    for each in (
        Device(name="h100", memory=80 << 30, bandwidth=3.35e12, half=989e12, single=67e12,
               workspace=32 << 20),
        Device(name="h200", memory=141 * _GB, bandwidth=4.8e12, half=989e12, single=67e12,
               workspace=32 << 20),
        Device(name="a100", memory=80 << 30, bandwidth=2.04e12, half=312e12, single=19.5e12),
        Device(name="l40s", memory=48 << 30, bandwidth=864e9, half=362e12, single=91.6e12),
        Device(name="rtx4090", memory=24 << 30, bandwidth=1008e9, half=165e12, single=82.6e12),
        Device(name="rtx3090", memory=24 << 30, bandwidth=936e9, half=71e12, single=35.6e12),
        Device(name="t4", memory=16 << 30, bandwidth=320e9, half=65e12, single=8.1e12),
    )
}  # fmt: skip


HERE = "here"
_SECONDS = 0.15  # for each of four measurements


@cache
def here() -> Device:
    """Return the accelerator of this machine, or its CPU, measured in about a second.

    Products of 2,048 x 2,048 and a copy of 64 MB: what large operations of a model reach, so that
    nothing is taken off (`reached`).
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = found or torch.device("cpu")
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.ones(2048, 2048, dtype=dtype, device=device)
        rates[dtype] = 2 * 2048**3 / _seconds(partial(torch.mm, a, a), device)
    source = torch.ones(1 << 24, device=device)
    target, small = torch.empty_like(source), torch.ones(1, device=device)
    copying = _seconds(partial(target.copy_, source), device)
    on_cpu = device.type == "cpu"
    return Device(
        name=HERE,
        memory=_total(device),
        bandwidth=2 * source.nbytes / copying,
        half=rates[torch.bfloat16],
        single=rates[torch.float32],
        launch=_seconds(partial(torch.add, small, 1.0), device),
        host=0.0 if on_cpu else _HOST,
        call=0.0 if on_cpu else _CALL,
        block=1 if on_cpu else 512,
        workspace=0 if on_cpu else 32 << 20,
        reached=(1.0, 1.0),
    )


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return the mean time of a call, of as many as fill the time."""
    wait = torch.accelerator.synchronize if device.type != "cpu" else (lambda: None)
    run()
    wait()
    start, count, calls = time.perf_counter(), 0, 1
    while (passed := time.perf_counter() - start) < _SECONDS:
        for _ in range(calls):
            run()
        wait()
        count, calls = count + calls, 2 * calls
    return passed / count


def _total(device: torch.device) -> int:
    """Return the bytes of memory of a device."""
    if device.type == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return getattr(torch, device.type).get_device_properties(device).total_memory


def device_named(name: str | None) -> Device | None:
    """Return a device of the table, or the one that is here; None for none.

    Raises OptionError for an unknown name.
    """
    if name is None:
        return None
    if not isinstance(name, str):
        raise OptionError(f"device={name!r} is not a name like {next(iter(KNOWN))!r} or {HERE!r}.")
    if name.lower() == HERE:
        return here()
    found = KNOWN.get(name.lower())
    if found is None:
        raise OptionError(
            f"device={name!r} is not known.{near_misses(name, [*KNOWN, HERE])} Known are "
            f"{', '.join(KNOWN)}; {HERE!r} measures this machine for a second; None counts bytes "
            "as on a CPU, and predicts no time."
        )
    return found


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {f"{prefix}ib": 1 << (10 * (i + 1)) for i, prefix in enumerate("kmgt")}


def memory_of(memory: int | str | None, device: Device | None) -> int:
    """Return bytes, from a number or words such as "24GiB"; by default the device's.

    Raises OptionError.
    """
    if memory is None:
        if device is None:
            raise OptionError('say how much memory there is: memory="24GiB", or device="rtx4090".')
        return device.memory
    found = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]*)\s*", str(memory))
    if found is None or found[2].lower() not in _UNITS or found[1].count(".") > 1:
        raise OptionError(
            f'memory={memory!r} is not a number of bytes: write 24e9, "24GB" or "24GiB".'
        )
    return int(float(found[1]) * _UNITS[found[2].lower()])
