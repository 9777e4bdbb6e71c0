"""Ctrl-C and SIGTERM, heard between steps."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

HEARD = (signal.SIGINT, signal.SIGTERM)


class Stopping:
    """Within it, the first signal is only noted, in `number`; the next acts as it always does."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        for number in HEARD:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: Any) -> None:
        for number in HEARD:
            signal.signal(number, self._before[number])

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, self._before[number])

    @property
    def code(self) -> int:
        """The exit code of a process that the signal has ended."""
        return 128 + (self.number or 0)
