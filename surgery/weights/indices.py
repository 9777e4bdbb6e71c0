"""What of a weight a copy is of: a block of it, by its index, or some of its rows, by number."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from surgery.compat.tensors import is_playing

Index: TypeAlias = tuple[int | slice, ...]


@dataclass(eq=False)
class Rows:
    """Some rows of a weight.

    numbers: the numbers of the rows (n,), ascending. labels: the labels of the current forward,
    which its first lookup checks too.
    """

    numbers: Tensor
    labels: list[Tensor] = field(default_factory=list, repr=False)
    known: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"known": {}, "labels": []}

    def on(self, device: torch.device) -> Tensor:
        """Return the numbers on a device."""
        if device.type == "meta" or is_playing():
            return self.numbers.to(device)
        if device not in self.known:
            self.known = {device: self.numbers.to(device)}
        return self.known[device]


Block: TypeAlias = Index | Rows


def block_of(t: Tensor, index: Block | None) -> Tensor:
    """Return t[index], all of it for None: a view, or a copy of rows."""
    if isinstance(index, Rows):
        return t.index_select(0, index.on(t.device))
    return t if index is None else t[index]


def write_block(t: Tensor, index: Block, value: Tensor) -> None:
    """Let t[index] be a value, in place."""
    if isinstance(index, Rows):
        t.index_copy_(0, index.on(t.device), value)
    else:
        t[index] = value


def subscript(index: Block) -> str:
    """Return an index as Python writes it."""
    if isinstance(index, Rows):
        return f"[{len(index.numbers)} rows]"
    parts = [str(i) if isinstance(i, int) else f"{i.start or 0}:{i.stop or ''}" for i in index]
    return f"[{', '.join(parts)}]"
