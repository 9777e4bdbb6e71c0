"""Modules outside of the blocks that FSDP2 has cut: captured one by one.

Dynamo gives up the function that calls the blocks in a loop, for the hooks of FSDP2 inside of it,
and does not look at modules of torch.nn that such a function calls.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from surgery.weights.shards import is_cut_block
from surgery.weights.sites import site_of


class Leaf:
    """What `module.forward` is of an embedding, a norm or a head outside of those blocks.

    running: whether a training forward of the whole model is under way.
    """

    def __init__(
        self, forward: Callable[..., Any], captured: Any, running: Callable[[], bool]
    ) -> None:
        self.forward, self.captured, self.running = forward, captured, running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.captured if self.running() else self.forward)(*args, **kwargs)


def leaves(
    model: nn.Module, compiled: Callable[..., Any], running: Callable[[], bool]
) -> dict[nn.Module, Leaf]:
    """Put `Leaf` in place of the forward of modules whose weights a function given up may read."""
    inside = [m for m in model.modules() if m is not model and is_cut_block(m)]
    covered = {id(own) for block in inside for own in block.modules()}
    found: dict[nn.Module, Leaf] = {}
    for module in model.modules() if inside else ():
        reads = any(site_of(p) is not None for p in module.parameters(recurse=False))
        known = type(module).__module__.startswith("torch.nn.")
        if reads and known and id(module) not in covered and "forward" not in module.__dict__:
            forward = MethodType(type(module).forward, module)
            found[module] = Leaf(forward, compiled(forward), running)
            module.__dict__["forward"] = found[module]
    return found
