"""What a device can do: two ceilings, and the price of a launch."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from surgery.errors import OptionError, near_misses


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of device.

    memory: bytes. bandwidth: bytes a second. half, single: floating-point operations a second of
    dense products of 16-bit and float32 numbers, as the maker says. launch: seconds between two
    kernels, at least. block: bytes that the allocator rounds up to. workspace: bytes that it holds
    for the libraries of products. reached: share of the ceilings that real kernels reach.
    """

    name: str
    memory: int
    bandwidth: float
    half: float
    single: float
    launch: float = 5e-6
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


def device_named(name: str | None) -> Device | None:
    """Return a device of the table; None for none. Raises OptionError for an unknown name."""
    if name is None:
        return None
    found = KNOWN.get(name.lower())
    if found is None:
        raise OptionError(
            f"device={name!r} is not known{near_misses(name, KNOWN)}. "
            f"Known are {', '.join(KNOWN)}; None counts bytes as on a CPU, and no time."
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
            f'memory={memory!r} is no number of bytes: write 24e9, "24GB" or "24GiB".'
        )
    return int(float(found[1]) * _UNITS[found[2].lower()])
