"""What of a step is lost in 16 bits: entries that had a gradient and are what they were.

A weight near 1 moves in bfloat16 by 1/256 or not at all: at a learning rate of 1e-5, nine tenths of
a full training's steps are lost. (Samplers step float32 copies, rso and velora round at random.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from surgery.weights import shards

EVERY = 50  # steps of which the first is looked at
ENTRIES = 1024  # of each weight, evenly spaced


class Unmoved:
    """Entries of 16-bit weights that the last step that was looked at has left as they were.

    step: its number, from 1; 0: none was. counts: entries unmoved and entries with a gradient.
    """

    def __init__(self) -> None:
        self.step = 0
        self.counts: Tensor | None = None
        self.held: list[tuple[Tensor, Tensor, Tensor]] = []

    def __getstate__(self) -> dict[str, Any]:
        return vars(Unmoved())

    def before(self, parameters: Iterable[Tensor], step: int) -> None:
        """Note what parameters are whose gradients are there; step: steps made."""
        self.held.clear()
        if step % EVERY:
            return
        for parameter in parameters:
            grad = parameter.grad
            narrow = parameter.dtype in (torch.bfloat16, torch.float16)
            if narrow and grad is not None and not grad.is_sparse:
                moving = _some(grad) != 0
                self.held.append((parameter, _some(parameter.detach()).clone(), moving))
        self.step = step + 1 if self.held else self.step

    @torch.no_grad()
    def after(self) -> None:
        """Count what has not moved."""
        found = [(_some(p.detach()) == old) & moving for p, old, moving in self.held]
        if found:
            still = torch.stack([each.sum().to("cpu") for each in found]).sum()
            moving = torch.stack([each.sum().to("cpu") for *_, each in self.held]).sum()
            self.counts = torch.stack([still, moving])
        self.held.clear()

    @property
    def share(self) -> float:
        """The share of entries with a gradient that have not moved."""
        if self.counts is None:
            return 0.0
        still, moving = self.counts.tolist()
        return still / max(moving, 1)


def _some(t: Tensor) -> Tensor:
    flat = shards.local(t).reshape(-1)
    return flat[:: max(1, flat.numel() // ENTRIES)]
