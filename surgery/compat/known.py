"""What a batch says in numbers, beside tensors without memory: whether a mask hides anything."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from surgery.compat.tensors import off_stage

_MOST = 1 << 20  # entries that are worth to be computed


class Known:
    """Data of tensors without memory that come of nothing but a batch's whole numbers."""

    def __init__(self) -> None:
        self._data = WeakIdKeyDictionary()  # tensor -> version, data

    def keep(self, like: Tensor, t: Tensor) -> None:
        """Note the data of a batch's tensor, if they are numbers to decide by and are there."""
        if not (t.is_floating_point() or t.is_meta or isinstance(t, FakeTensor)):
            with off_stage():
                self.note(like, t.detach().cpu())

    def note(self, like: Tensor, data: Any) -> None:
        """Note what `result` has found for a tensor."""
        if isinstance(data, Tensor) and data.numel() <= _MOST and data.shape == like.shape:
            self._data[like] = like._version, data

    def result(self, func: Any, args: Sequence[Any], options: dict[str, Any]) -> Any:
        """Return what an operation makes of what is known; None if that does not say."""
        given = [t for t in pytree.tree_leaves((args, options)) if isinstance(t, Tensor)]
        if not given or not all(map(self._is_known, given)) or func._schema.is_mutable:
            return None
        if torch.Tag.nondeterministic_seeded in func.tags:
            return None
        with off_stage(), suppress(Exception):  # what it raises, it raises of the played ones
            data = pytree.tree_map_only(Tensor, lambda t: self._data[t][1], (args, options))
            return func(*data[0], **data[1])
        return None

    def _is_known(self, t: Tensor) -> bool:
        found = self._data.get(t)
        return found is not None and found[0] == t._version
