"""What autograd tells nobody: the end of a backward, versions, norms of many tensors at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from surgery.errors import SurgeryError


def after_backward(call: Callable[[], None]) -> None:
    """Call once the backward under way has ended, behind all that was asked for so far."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def first_order_only(by: str) -> None:
    """Raise SurgeryError in a backward whose results shall be differentiated again."""
    if torch.is_grad_enabled():
        raise SurgeryError(
            f"{by}: a gradient is to be differentiated a second time (create_graph=True), and what "
            f"{by} keeps for backward does not suffice for that. Leave {by} out, or take gradients "
            "with create_graph=False."
        )


def hooks_of(t: Tensor) -> list[Callable[[Tensor], Tensor | None]]:
    """Return the hooks that `register_hook` has put on a tensor."""
    return [*(t._backward_hooks or {}).values()]


def later_hooks_of(t: Tensor) -> list[int]:
    """Return the keys of hooks that `register_post_accumulate_grad_hook` has put on a tensor."""
    return [*(t._post_accumulate_grad_hooks or {})]  # pyright: ignore[reportAttributeAccessIssue]


def version(t: Tensor) -> int:
    """Return a number that every change in place raises."""
    return t._version


def norms(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the 2-norm of each tensor, one kernel a device for all of them.

    torch's public `get_total_norm` keeps only their norm.
    """
    return list(torch._foreach_norm(list(tensors), 2, dtype))  # pyright: ignore[reportPrivateImportUsage]
