"""What transformers does for the sake of reentrant checkpoints, undone: captured ones are not.

It makes the embeddings' output require gradients (which, with frozen embeddings, would force
backward through every block), and some attention modules do the same to a bias of theirs (T5 and
its relatives), which Dynamo cannot follow inside a checkpoint.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn


class Workarounds:
    """The workarounds of one model: taken off when switched on, put back by `restore`."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model  # a PreTrainedModel where the methods below are called
        self.biased: Sequence[Any] = [m for m in model.modules() if _only_makes_biases_require(m)]
        self.off: list[Any] = []
        self.hooked = False

    def take_off(self) -> None:
        """Called before every training forward, since checkpointing may be enabled at any time."""
        if getattr(self.model, "_require_grads_hooks", None):
            self.model.disable_input_require_grads()
            self.hooked = True
        for module in self.biased:
            if module.gradient_checkpointing:
                module.gradient_checkpointing = False
                self.off.append(module)

    def restore(self) -> None:
        if self.hooked:
            self.model.enable_input_require_grads()
        for module in self.off:
            module.gradient_checkpointing = True


def _only_makes_biases_require(module: nn.Module) -> bool:
    """Whether the forward reads its checkpointing flag, but runs no checkpoint of its own."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    names = code.co_names if code is not None else ()
    reads = "gradient_checkpointing" in names and "requires_grad" in names
    return reads and "_gradient_checkpointing_func" not in names
