"""Which form of a kernel runs on which device, and how large a piece is: all of it stands here.

A kernel is a pure function of tensors, numbers and strings. A CPU calls it on pieces that stay in
its cache; an accelerator once, on whole tensors, compiled into one launch. Sizes of pieces follow
caches on a CPU, and on an accelerator what is read again for each piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

Forced = Literal["accelerator", "cpu"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes for one kind of device.

    whole: kernels take whole tensors, and are compiled. drawn: entries of a direction that are
    drawn at a time. carried: entries of a 16-bit weight that are rounded at a time. packed: entries
    of an activation that are packed at a time. logits: bytes of a chunk's logits, in float32.
    tokens: of a chunk at least. tile: bytes of logits that are some classes' only, in float32.
    """

    whole: bool
    drawn: int
    carried: int
    packed: int
    logits: int
    tokens: int
    tile: int


_ALL = 1 << 62
CPU = Plan(
    whole=False,
    drawn=1 << 19,  # 2 MB, the size of a cache
    carried=1 << 18,
    packed=1 << 18,  # temporaries that stay in the cache, and in the heap
    # Smaller chunks read the head's weight too often: at V = 49,152 on two cores, 128 tokens took
    # 0.9x of eager's time and 64 tokens 1.2x.
    logits=24 << 20,
    tokens=1,
    tile=8 << 20,
)
# Each chunk adds V x D numbers to a float32 sum: 2 GB of traffic at V = 128,256 and D = 2,048, as
# much time as a third of the products of 1,024 tokens.
ACCELERATOR = Plan(
    whole=True,
    drawn=_ALL,
    carried=_ALL,
    packed=_ALL,
    logits=128 << 20,
    tokens=1024,
    tile=128 << 20,
)

Compile = bool | Literal["auto"]

_forced: Forced | None = None
_count = True
_compile: Compile = "auto"


def plan_of(device: torch.device) -> Plan:
    """Return the sizes for a device."""
    if _forced is not None:
        return ACCELERATOR if _forced == "accelerator" else CPU
    return CPU if device.type in ("cpu", "meta") else ACCELERATOR


def counting() -> bool:
    """Whether compiled kernels are traced and counted, and not compiled."""
    return _forced == "accelerator" and _count


def compiles(device: torch.device, graphs: bool = False) -> bool:
    """Whether kernels are compiled on a device. graphs: regions of captured graphs, which may be on
    a CPU, too."""
    if _compile is True and graphs:
        return device.type != "meta"
    return _compile is not False and plan_of(device).whole


def compile_for(wanted: Compile) -> None:
    """Take the `compile=` of the surgery whose forward begins; its backward and step follow."""
    global _compile
    _compile = wanted


@contextmanager
def forced(what: Forced, count: bool = True) -> Iterator[None]:
    """Run one kind's form on every device inside: what is launched can be counted anywhere.

    count: kernels of an accelerator are traced and run as one operation each, not compiled.
    """
    global _forced, _count
    before = _forced, _count
    _forced, _count = what, count
    try:
        yield
    finally:
        _forced, _count = before


def bands(height: int, width: int, size: int) -> Iterator[slice]:
    """Cut the rows of a matrix (height, width) into bands of at most `size` entries."""
    rows = max(1, size // max(1, width))
    return (slice(start, min(start + rows, height)) for start in range(0, height, rows))
