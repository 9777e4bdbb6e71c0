"""Tensors as torch sees them inside: storages, fakes, trees, wrapper subclasses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass


def storage_of(t: Tensor) -> int:
    """Return what tells the storage behind a tensor from others that are alive, fake ones too."""
    return t.untyped_storage()._cdata


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


def adds_wider(t: Tensor) -> bool:
    """Whether products of tensors like this one can be added into float32 as they are computed."""
    return t.is_cuda and "dtype_out" in torch.ops.aten.addmm.overloads()
