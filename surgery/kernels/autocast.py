"""What autocast is set to, and setting it to that again where something runs later."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Cast:
    """What autocast is set to on a kind of device. dtype: None where it is off."""

    device: str
    dtype: torch.dtype | None

    def again(self) -> AbstractContextManager[Any]:
        """Set it to that inside."""
        if self == cast_now(self.device):
            return nullcontext()
        if self.dtype is None:
            return torch.autocast(self.device, enabled=False)
        return torch.autocast(self.device, dtype=self.dtype)


def cast_now(device: str) -> Cast:
    """Return what autocast is set to."""
    on = torch.is_autocast_enabled(device)
    return Cast(device, torch.get_autocast_dtype(device) if on else None)
