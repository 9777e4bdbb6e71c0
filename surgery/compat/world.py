"""One process of many, without the others: its collectives take memory and send nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group


@contextmanager
def one_of(count: int) -> Iterator[DeviceMesh]:
    """Be the first of so many processes inside; none may have been joined before."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    distributed.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (count,))
    finally:
        distributed.destroy_process_group()


def shard(model: nn.Module, blocks: Iterable[str], mesh: DeviceMesh) -> None:
    """Let FSDP2 cut a model: each block by itself, then the rest."""
    for name in blocks:
        fully_shard(model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextmanager
def resizing(told: Callable[[Tensor], None]) -> Iterator[None]:
    """Tell of each tensor whose memory FSDP2 gives back or takes again: it calls no operator."""
    before = [
        (module, name, getattr(module, name))
        for module in (_fsdp_param, _fsdp_param_group)
        for name in ("free_storage", "alloc_storage")
        if hasattr(module, name)
    ]

    def telling(call: Any) -> Any:
        @wraps(call)
        def resize(tensor: Tensor) -> None:
            call(tensor)
            told(tensor)

        return resize

    for module, name, call in before:
        setattr(module, name, telling(call))
    try:
        yield
    finally:
        for module, name, call in before:
            setattr(module, name, call)
