"""Weights that FSDP2 (`fully_shard`) has cut: what a rank holds of them, and what a forward reads.

Between steps a module holds the sharded parameters, DTensors, which optimizers step; in forward and
backward the whole ones, other objects, which graphs read. Both stay the same objects for the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from surgery.compat import autograd
from surgery.errors import ModelError


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was called on a part of the model."""
    return any(is_cut_block(module) for module in model.modules())


def is_cut_block(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on this module itself."""
    return isinstance(module, FSDPModule)


def flattened(name: str) -> ModelError:
    """Return the error for a weight that is no longer a parameter of its module."""
    return ModelError(
        f"{name} is not a parameter of its module any more: FullyShardedDataParallel (FSDP1) or "
        "DeepSpeed has flattened it together with others, so it cannot be trained by itself. Use "
        "FSDP2, torch.distributed.fsdp.fully_shard (accelerate: fsdp_version: 2)."
    )


# -- what this rank holds --------------------------------------------------------------------------


def is_cut(t: Any) -> bool:
    """Whether this rank holds only a part of it."""
    return isinstance(t, DTensor)


def local(t: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, sharing its storage: all of it if it is not cut."""
    return t.to_local() if isinstance(t, DTensor) else t


def local_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return this rank's part of an optimizer's state of one parameter; all if not sharded."""
    if not any(is_cut(value) for value in state.values()):
        return state
    return {key: local(v) if isinstance(v, Tensor) else v for key, v in state.items()}


def moment(value: Tensor) -> Tensor:
    """Return a tensor of an optimizer's state, whole and in float64, even if it is quantised."""
    found = whole(value)
    return torch.empty(found.shape, dtype=torch.float64, device=found.device).copy_(found)


def version(t: Tensor) -> int:
    """Return a number that every change in place raises."""
    return autograd.version(local(t))


def part_of(weight: Tensor) -> tuple[Tensor, int, int]:
    """Return what this rank holds of a weight, as a matrix sharing its storage (those of experts
    under one another, a vector as one row), and the row and column of the whole where it begins."""
    own = local(weight).detach()
    if weight.ndim < 2:
        return own.view(1, -1), 0, _first(weight)
    between = weight.shape[1:-1].numel()
    return own.view(-1, own.shape[-1]), _first(weight) * between, 0


def rows_of(weight: Tensor, part: slice) -> Tensor:
    """Return rows of a weight as a matrix. This rank must hold these rows."""
    matrix, top, _ = part_of(weight)
    start, stop, _ = part.indices(top + matrix.shape[0])
    return matrix[start - top : stop - top]


def _first(t: Tensor) -> int:
    """Return the place of this rank's first entry along the first dimension."""
    start, length = 0, t.shape[0] if t.ndim else 0
    if not isinstance(t, DTensor):
        return start
    for dim, placement in enumerate(t.placements):
        if placement.is_shard():
            height = -(-length // t.device_mesh.size(dim))  # as torch.chunk cuts
            begin = min(length, height * t.device_mesh.get_local_rank(dim))
            start, length = start + begin, min(height, length - begin)
    return start


# -- whole values ----------------------------------------------------------------------------------


def whole(t: Tensor) -> Tensor:
    """Return all of a tensor; on all ranks, if it is cut."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def gathered(t: Any, keep: bool) -> Any:
    """Return all of a tensor if `keep`, else None; on all ranks. What is not cut: itself."""
    if not isinstance(t, DTensor):
        return t
    found = whole(t.detach())
    return found.cpu() if keep else None


def whole_state(model: nn.Module, keep: bool) -> dict[str, Any]:
    """Return the model's state_dict with whole tensors if `keep`; on all ranks. Tied ones stay one.

    keep: on the other ranks, values are None.
    """
    names = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    seen: dict[int, Any] = {}
    found = {}
    for name, tensor in model.state_dict().items():
        key = names.get(name, id(tensor))
        if key not in seen:
            seen[key] = gathered(tensor, keep)
        found[name] = seen[key]
    return found


def like(value: Tensor, t: Tensor) -> Tensor:
    """Return a whole value, which all ranks have, cut as a tensor is."""
    if not isinstance(t, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(t.device), t.device_mesh, t.placements, src_data_rank=None)


def cut_as(own: Tensor, weight: Tensor) -> Tensor:
    """Return what this rank holds of something of a weight's shape, as a tensor cut as the weight;
    itself if that is not cut."""
    if not isinstance(weight, DTensor):
        return own
    mesh, placements = weight.device_mesh, weight.placements
    shape, stride = weight.shape, weight.stride()
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=shape, stride=stride)


def take(t: Tensor, value: Tensor) -> None:
    """Copy a whole value into a tensor; if that is sharded, into the part that this rank holds."""
    local(t.detach()).copy_(local(like(value, t)))


# -- sums over ranks -------------------------------------------------------------------------------


def add_up(values: Tensor, like: Iterable[Tensor]) -> Tensor:
    """Return values (n,) of this rank's parts, added up over those who hold them.

    like: what they were taken from; all on one mesh. Unchanged if none of it is cut.
    """
    cut = next((t for t in like if isinstance(t, DTensor)), None)
    if cut is None:
        return values
    for dim, placement in enumerate(cut.placements):
        if placement.is_shard():
            distributed.all_reduce(values, group=cut.device_mesh.get_group(dim))
    return values


def average(parameters: Sequence[nn.Parameter], like: DTensor) -> None:
    """Average the gradients of parameters that every rank holds whole, in place."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for dtype in {grad.dtype for grad in grads}:
        mine = [grad for grad in grads if grad.dtype == dtype]
        flat = torch.cat([grad.flatten() for grad in mine])
        for dim in range(like.device_mesh.ndim):
            distributed.all_reduce(flat, group=like.device_mesh.get_group(dim))
        flat /= like.device_mesh.size()
        for grad, part in zip(mine, flat.split([g.numel() for g in mine]), strict=True):
            grad.copy_(part.view_as(grad))
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
