"""Ctrl-C and SIGTERM, heard between steps."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

HEARD = (signal.SIGINT, signal.SIGTERM)


class Stopping:
    """Within it, the first signal is only noted, in `number`; the next acts as it always does.

    A signal that the process was started to ignore (a shell's background job, Ctrl-C) stays so.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        for number in HEARD:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, self._before[number])

    @property
    def code(self) -> int:
        """The exit code of a process that the signal has ended."""
        return 128 + (self.number or 0)
