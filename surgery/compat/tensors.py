"""Tensors as torch sees them inside: storages, fakes, trees, wrapper subclasses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import (
    _disable_current_modes,
    is_traceable_wrapper_subclass,
    transform_subclass,
)
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T", bound=Tensor)


def storage_of(t: Tensor) -> int:
    """Return what tells the storage behind a tensor from others that are alive, fake ones too."""
    return t.untyped_storage()._cdata


def is_given_back(t: Tensor) -> bool:
    """Whether a tensor's memory was freed while the tensor goes on, as FSDP2 does after forward."""
    return type(t) in (Tensor, Parameter) and t.numel() > 0 and t.untyped_storage().size() == 0


def address(t: Tensor) -> int:
    """Return where a tensor's entries lie; without memory, a number that tells it from others."""
    if isinstance(t, FakeTensor):
        return storage_of(t) + int(t.storage_offset()) * t.element_size()
    return t.data_ptr()


_played: ContextVar[FakeTensorMode | None] = ContextVar("played", default=None)


@contextmanager
def playing(mode: FakeTensorMode) -> Iterator[None]:
    """Take a mode's tensors without memory for real ones inside: a whole step is played on them."""
    token = _played.set(mode)
    try:
        with mode:
            yield
    finally:
        _played.reset(token)


def is_fake(value: Any) -> bool:
    """Whether a value is a tensor without memory of a dry run; not one to play a step on."""
    return isinstance(value, FakeTensor) and value.fake_mode is not _played.get()


def is_playing() -> bool:
    """Whether a step is played on tensors without memory."""
    return _played.get() is not None


def off_stage() -> AbstractContextManager[Any]:
    """Make real tensors inside, also where a step is played or a graph is traced: what a process
    keeps for later must not be without memory."""
    return _disable_current_modes()


def is_played(value: Any) -> bool:
    """Whether a value is a tensor without memory that a step is played on."""
    return isinstance(value, FakeTensor) and value.fake_mode is _played.get()


def fakes(real: bool = False) -> FakeTensorMode:
    """Return a mode of tensors without memory. real: operations may meet real tensors in it."""
    return FakeTensorMode(allow_non_fake_inputs=real)


def is_wrapper(t: Tensor) -> bool:
    """Whether a tensor is made of others inside: DTensor, and torchao's quantised weights."""
    return is_traceable_wrapper_subclass(t)


def rebuilt(t: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the like of a wrapper around other tensors, made of those inside."""
    return transform_subclass(t, lambda _, inside: make(inside))  # pyright: ignore[reportArgumentType]


def is_packed(t: Tensor) -> bool:
    """Whether a tensor is of bytes that its Linear unpacks: bitsandbytes' weights."""
    return type(t).__name__ in ("Params4bit", "Int8Params")


def beside(t: Tensor) -> dict[str, Any]:
    """Return what bitsandbytes' weights have beside their bytes: scales and tables."""
    return {name: vars(t)[name] for name in ("quant_state", "CB", "SCB") if name in vars(t)}


def inside(t: Tensor) -> list[Tensor]:
    """Return the tensors with memory that a quantised tensor is made of; itself if it is plain."""
    if is_wrapper(t) and not isinstance(t, DTensor):
        names, _ = t.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
        return [each for name in names for each in inside(getattr(t, name))]
    found, seen = [t], [*beside(t).values()]
    for value in seen:
        if isinstance(value, Tensor):
            found.append(value)
        elif value is not None and type(value).__name__ == "QuantState":
            seen += vars(value).values()
    return found


def leaves(tree: Any) -> list[Any]:
    """Return the leaves of nested lists, tuples, dicts and ModelOutputs."""
    return pytree.tree_leaves(tree)


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Return the leaves of a tree, and what puts them together again."""
    return pytree.tree_flatten(tree)


def unflatten(found: list[Any], spec: Any) -> Any:
    """Put leaves together again."""
    return pytree.tree_unflatten(found, spec)


def each(call: Callable[[Any], Any], tree: Any) -> Any:
    """Return the tree with a function applied to every leaf."""
    return pytree.tree_map(call, tree)


def wrapper(kind: type[T], shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> T:
    """Return a tensor of a subclass that has a shape and no memory."""
    make: Any = kind._make_wrapper_subclass
    return make(kind, shape, dtype=dtype, device=device)


def held_by(value: Any) -> list[Tensor]:
    """Return the tensors whose memory a tensor holds: those that one without memory is made of,
    which its class tells by `holds`, or itself."""
    if not isinstance(value, Tensor):
        return []
    holds: Any = getattr(type(value), "holds", None)
    return [value] if holds is None else holds(value)


def plainly() -> AbstractContextManager[Any]:
    """Look at tensors of subclasses with __torch_function__ as if they were plain ones inside."""
    return torch._C.DisableTorchFunctionSubclass()


def bare(t: Tensor) -> tuple[int, ...]:
    """Return the shape of a tensor, of whatever subclass."""
    with plainly():
        return tuple(t.shape)


# How often optimizers have stepped a parameter whose version was asked for: fused ones change what
# torch's own versions do not tell.
_STEPS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups if len(_STEPS) else ():
        for p in group["params"]:
            if p.grad is not None and p in _STEPS:
                _STEPS[p] += 1


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_stepped)


def version_of(t: Tensor) -> tuple[int, int, int] | None:
    """Return what is another one whenever a tensor was changed in place, or got another memory;
    None: nobody counts."""
    if t.is_inference():
        return None
    place = address(t) if type(t) in (Tensor, Parameter) else 0
    if isinstance(t, Parameter) and t.requires_grad:
        _watch_optimizers()
        if t not in _STEPS:
            _STEPS[t] = 0
        return t._version, _STEPS[t], place
    return t._version, 0, place


def adds_wider(t: Tensor) -> bool:
    """Whether products of tensors like this one can be added into float32 as they are computed."""
    return t.is_cuda and "dtype_out" in torch.ops.aten.addmm.overloads()
