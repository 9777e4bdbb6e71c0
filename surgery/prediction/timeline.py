"""What a step allocates and frees, in order: its peak, and who holds it."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from surgery.compat import stage
from surgery.prediction.devices import Device

Phase = Literal["forward", "backward", "step"]
Kind = Literal["weights", "optimizer", "batch", "gradients", "activations", "temporaries"]


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Storages of one kind that are alive at the peak.

    where: the module that made them, with * for the number of a block. made_by: the operation.
    count: the number of storages. bytes: the size of all of them.
    """

    kind: Kind
    where: str
    made_by: str
    count: int
    bytes: int

    def __str__(self) -> str:
        made = f": {self.made_by} in {self.where or 'the model'}" if self.made_by else ""
        return f"{self.count} x {self.kind}{made}"


@dataclass(frozen=True, kw_only=True)
class _Storage:
    size: int
    made_by: str
    where: str
    phase: Phase | None


class Timeline:
    """The watcher of a stage.

    device: whose blocks storages are rounded up to, and whose time operations take; None: bytes
    are counted as they are, and no time.
    """

    def __init__(self, device: Device | None) -> None:
        self.device = device
        self.storages: dict[int, _Storage] = {}
        self.kinds: dict[int, Kind] = {}
        self.phase: Phase | None = None
        self.events: list[tuple[int, Phase | None]] = []  # key + 1 of what came, -(key + 1)
        self.launches = 0
        self._on_device = self._on_host = 0.0
        self._where = ""
        self._called = ""
        self._marks: list[tuple[int, str]] = []  # number of an autograd node, and whose it is
        self._last = 0
        self._opened: list[int] = []  # events before functions that are one launch

    # -- told by the stage ------------------------------------------------------------------------

    def came(self, key: int, size: int, operation: str) -> None:
        block = self.device.block if self.device is not None else 1
        self.storages[key] = _Storage(
            size=-(-size // block) * block,
            made_by=operation.partition("::")[2].partition(".")[0] or operation,
            where=self._place(),
            phase=self.phase,
        )
        self.events.append((key + 1, self.phase))

    def went(self, key: int) -> None:
        self.events.append((-key - 1, self.phase))

    def opened(self) -> None:
        self._opened.append(len(self.events))

    def closed(self) -> None:
        place = self._opened.pop()
        inside = self.events[place:]
        told = {abs(event) for event, _ in inside if event < 0} & {e for e, _ in inside if e > 0}
        self.events[place:] = [each for each in inside if abs(each[0]) not in told]

    def ran(
        self, operation: str, flops: int, dtype: torch.dtype, traffic: int, compiled: bool
    ) -> None:
        self.launches += 1
        if self.device is not None:
            self._on_device += self.device.seconds(flops, dtype, traffic)
            self._on_host += self.device.call if compiled else self.device.host

    # -- told by the step -------------------------------------------------------------------------

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Say which part of the step is run inside."""
        self.phase = phase
        try:
            yield
        finally:
            self.phase, self._where = None, ""

    def at(self, where: str) -> None:
        """Say whose operations come next in forward."""
        if self.phase == "forward" and where != self._where:
            self._where = where
            self._marks.append((stage.place_in_forward(), where))

    def end_forward(self) -> None:
        """Say that forward has made its autograd nodes: those made in backward come behind."""
        self._last = stage.place_in_forward()

    def begin(self) -> None:
        """Forget what has happened, but for what is alive."""
        alive = self.alive()
        self.events = [(key + 1, None) for key in alive]
        self.storages = {key: self.storages[key] for key in alive}
        self._marks, self.launches = [], 0
        self._on_device = self._on_host = 0.0

    def alive(self) -> list[int]:
        """Return what is alive now, the oldest first."""
        found: dict[int, None] = {}
        for event, _ in self.events:
            if event > 0:
                found[event - 1] = None
            else:
                found.pop(-event - 1, None)
        return list(found)

    def live(self) -> int:
        """Return the bytes that are alive now."""
        return sum(self.storages[key].size for key in self.alive())

    def call(self, kind: Kind, keys: Iterator[int]) -> None:
        """Say what storages are."""
        for key in keys:
            self.kinds.setdefault(key, kind)

    # -- asked ------------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """The device's time, or the host's, which launches ahead of it, if that is longer."""
        return max(self._on_device, self._on_host)

    def course(self) -> list[tuple[Phase | None, Mapping[Kind, int]]]:
        """Return the bytes by kind after each event, with the phase that it fell into."""
        held: dict[Kind, int] = defaultdict(int)
        found = []
        for event, phase in self.events:
            key = abs(event) - 1
            held[self._kind(key)] += self.storages[key].size * (1 if event > 0 else -1)
            found.append((phase, dict(held)))
        return found

    def held(self, first: Sequence[int]) -> dict[Kind, int]:
        """Return the bytes by kind of storages, and the most that gradients and optimizer take."""
        found: dict[Kind, int] = defaultdict(int)
        for key in first:
            found[self._kind(key)] += self.storages[key].size
        course = [held for _, held in self.course()]
        for kind in ("gradients", "optimizer"):  # what is made inside of DTensors is seen late
            found[kind] = max((held.get(kind, 0) for held in course), default=0)
        return dict(found)

    def peak(self) -> tuple[int, Phase, tuple[Holder, ...]]:
        """Return the most bytes that were alive at a time, in which phase, and what held them."""
        live = most = place = 0
        for i, (event, _) in enumerate(self.events):
            key = abs(event) - 1
            live += self.storages[key].size * (1 if event > 0 else -1)
            if live > most:
                most, place = live, i
        alive: set[int] = set()
        for event, _ in self.events[: place + 1]:
            if event > 0:
                alive.add(event - 1)
            else:
                alive.discard(-event - 1)
        return most, self.events[place][1] or "forward", self._holders(alive)

    def _holders(self, alive: set[int]) -> tuple[Holder, ...]:
        groups: dict[tuple[Kind, str, str], list[int]] = defaultdict(list)
        for key in alive:
            storage, kind = self.storages[key], self._kind(key)
            own = kind in ("activations", "temporaries")
            where, made = (storage.where, storage.made_by) if own else ("", "")
            groups[kind, where, made].append(storage.size)
        found = [
            Holder(kind=kind, where=where, made_by=made, count=len(sizes), bytes=sum(sizes))
            for (kind, where, made), sizes in groups.items()
        ]
        return tuple(sorted(found, key=lambda each: -each.bytes))

    def _kind(self, key: int) -> Kind:
        known = self.kinds.get(key)
        if known is not None:
            return known
        return "activations" if self.storages[key].phase == "forward" else "temporaries"

    def _place(self) -> str:
        if self.phase == "backward":
            place = stage.place_in_backward()
            if place is not None and self._marks and place < self._last:
                found = bisect_right(self._marks, place, key=lambda mark: mark[0])
                self._where = self._marks[max(0, found - 1)][1]
        return self._where
