"""Modules that a function calls which Dynamo has given up: captured one by one.

It gives up one that calls blocks in a loop and breaks inside of it (for the hooks of FSDP2, or for
a layer that is dropped at random), and does not look at modules of torch.nn that it calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

from torch import nn

from surgery.compat.fsdp import own_class
from surgery.weights.shards import is_cut_block
from surgery.weights.sites import site_of


class Leaf:
    """What `module.forward` is of an embedding, a norm or a head outside of the blocks.

    running: whether a training forward of the whole model is under way.
    """

    def __init__(
        self, forward: Callable[..., Any], captured: Any, running: Callable[[], bool]
    ) -> None:
        self.forward, self.captured, self.running = forward, captured, running

    def __getstate__(self) -> dict[str, Any]:
        return {"forward": self.forward, "captured": None, "running": bool}  # until put anew

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.captured if self.running() else self.forward)(*args, **kwargs)


def outside_of_blocks(model: nn.Module, trained: bool = True) -> list[nn.Module]:
    """Return the modules that read weights outside of the blocks that FSDP2 has cut, or that it has
    cut by themselves, such as a head. trained: only weights that passes train."""
    inside = [m for m in model.modules() if m is not model and is_cut_block(m)]
    covered = {id(own) for block in inside if not can_be_leaf(block) for own in block.modules()}
    outside = [m for m in model.modules() if id(m) not in covered] if inside else []
    reading = [
        m for m in outside if any(site_of(p) or not trained for p in m.parameters(recurse=False))
    ]
    return [m for m in reading if can_be_leaf(m)]


def can_be_leaf(module: nn.Module) -> bool:
    """Whether a module is one of torch's own with nothing else in the place of its forward."""
    return own_class(module).__module__.startswith("torch.nn.") and "forward" not in module.__dict__


def put_leaves(
    modules: Iterable[nn.Module], compiled: Callable[..., Any], running: Callable[[], bool]
) -> dict[nn.Module, Leaf]:
    """Put `Leaf` in place of the forward of each module."""
    found: dict[nn.Module, Leaf] = {}
    for module in modules:
        forward = MethodType(type(module).forward, module)
        found[module] = module.__dict__["forward"] = Leaf(forward, compiled(forward), running)
    return found
