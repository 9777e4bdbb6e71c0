"""What autograd tells nobody: the end of a backward, versions, norms of many tensors at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from surgery.errors import SurgeryError


def after_backward(call: Callable[[], None]) -> None:
    """Call once the backward under way has ended, behind all that was asked for so far."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def backward_now() -> int:
    """Return a number for the backward under way in this thread; -1: there is none."""
    return torch._C._current_graph_task_id()


def is_transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is under way."""
    transform: Any = peek_interpreter_stack()
    return transform is not None or forward_ad._current_level >= 0


def keeps_graph() -> bool:
    """Whether the backward under way was called with retain_graph=True."""
    inside: Any = torch._C
    return inside._autograd._get_current_graph_task_keep_graph()


def first_order_only(by: str) -> None:
    """Raise SurgeryError in a backward that is to be differentiated again (create_graph=True)."""
    if torch.is_grad_enabled():
        raise SurgeryError(
            f"{by}: a gradient is to be differentiated a second time (create_graph=True), but what "
            f"{by} keeps for backward is not enough for that. Leave {by} out, or take gradients "
            "with create_graph=False."
        )


def hooks_of(t: Tensor) -> list[Callable[[Tensor], Tensor | None]]:
    """Return the hooks that `register_hook` has put on a tensor."""
    return [*(t._backward_hooks or {}).values()]


def hooks_alone(t: Tensor, others: Iterable[Tensor]) -> list[Callable[[Tensor], Tensor | None]]:
    """Return the hooks that are on a tensor and not on one of the others as well: whoever puts one
    on every parameter means each gradient once."""
    known = {_kind(hook) for other in others for hook in hooks_of(other)}
    return [hook for hook in hooks_of(t) if _kind(hook) not in known]


def _kind(hook: Any) -> Any:
    """Return what hooks have in common that were made in one place."""
    while isinstance(hook, partial):
        hook = hook.func
    function = getattr(hook, "__func__", hook)
    return getattr(function, "__code__", type(hook))


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
