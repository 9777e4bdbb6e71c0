"""Errors out of backward and out of an optimizer's step, as they pass by."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

Heard = Callable[[BaseException], None]


@functools.cache  # once: torch has hooks for what goes well, and none for an error
def hear(in_backward: Heard, in_step: Heard) -> None:
    """Call with each error that leaves a backward, or a step of an optimizer made from now on.

    The error goes on its way: a listener may add notes to it.
    """
    autograd: Any = torch.autograd
    autograd._engine_run_backward = passing(autograd._engine_run_backward, in_backward)
    before = Optimizer._patch_step_function

    def hook_step(self: Optimizer) -> None:
        before(self)
        step: Any = type(self).step
        if getattr(step, "heard_by", None) is not in_step:
            own: Any = passing(step, in_step)
            own.heard_by = in_step
            type(self).step = own  # as torch puts its own hooks there

    Optimizer._patch_step_function = hook_step


def passing(call: Callable[..., Any], heard: Heard) -> Callable[..., Any]:
    """Return a function that tells of each error that leaves it."""

    @functools.wraps(call)
    def told(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            heard(error)
            raise

    return told


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocator of torch has found no memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU's allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)
