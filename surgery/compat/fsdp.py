"""Data parallelism seen from inside: FSDP2's parameters, the DDP around a forward, ZeRO's marks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, distributed, nn
from torch.distributed._composable.contract import REGISTRY_KEY, RegistryItem
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

M = TypeVar("M", bound=type[nn.Module])
_IGNORED = "_ddp_params_and_buffers_to_ignore"

# By (id of the module, name): the sharded parameter, and the whole one that a forward reads.
Twins: TypeAlias = dict[tuple[int, str], tuple[nn.Parameter, nn.Parameter | None]]


def twins(model: nn.Module, gather: bool) -> Twins:
    """Return the sharded and the whole parameter of what FSDP2 has cut; {} without it.

    gather: make whole ones that no forward has made yet, on all ranks, block by block.
    """
    found: Twins = {}
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        # No public way leads from one to the other: a forward has only the whole one in place.
        cut = [p for group in _groups(module) for p in group.fsdp_params]
        if gather and not all(hasattr(p, "_unsharded_param") for p in cut):
            module.unshard()
            module.reshard()
        for p in cut:
            info, pair = p._module_info, (p.sharded_param, getattr(p, "_unsharded_param", None))
            found[id(info.module), info.param_name] = pair
            for place in zip(info.shared_modules, info.shared_param_names, strict=True):
                found[id(place[0]), place[1]] = pair
    return found


def _groups(module: FSDPModule) -> list[Any]:
    state: Any = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def waits(model: nn.Module, whole: Tensor) -> bool:
    """Whether the gradient of a whole parameter has yet to be sent, as `set_requires_gradient_sync`
    wants it: it is there, or FSDP2 has put it away in the dtype that it is sent in."""
    if whole.grad is not None:
        return True
    groups = [g for m in model.modules() if isinstance(m, FSDPModule) for g in _groups(m)]
    cut = [p for group in groups for p in group.fsdp_params]
    own = (p for p in cut if getattr(p, "_unsharded_param", None) is whole)
    return any(p.unsharded_accumulated_grad is not None for p in own)


def leave_to_us(kind: M) -> M:
    """Let `fully_shard` leave modules of a class alone: as what is replicated, not sharded."""
    setattr(kind, REGISTRY_KEY, {"replicate": RegistryItem()})
    return kind


def lay(t: Tensor, own: Tensor) -> None:
    """Let a tensor, or what this rank holds of it, have the memory of another."""
    if isinstance(t, DTensor):
        t._local_tensor = own
    else:
        t.data = own


def held_of(t: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, without an operator's being called."""
    return t._local_tensor if isinstance(t, DTensor) else t


def own_class(model: nn.Module) -> type:
    """Return the class of a model as it was before fully_shard, which makes one of its own."""
    kind = type(model)
    return kind.__mro__[2] if issubclass(kind, FSDPModule) else kind


def ddp_around() -> DistributedDataParallel | None:
    """Return the DistributedDataParallel whose forward is under way."""
    return DistributedDataParallel._active_ddp_module


def joins(wrapper: DistributedDataParallel) -> bool:
    """Whether `with ddp.join():` is around, in which ranks take other numbers of steps."""
    return wrapper._join_config.enable


def leave_out_of_ddp(model: nn.Module, names: Iterable[str]) -> None:
    """Let a DistributedDataParallel that will be put around a model leave parameters out, which get
    no gradient of their own. Under PEFT's names too, since it may come between."""
    known = [each for name in names for each in (name, f"base_model.model.{name}")]
    if known:
        model.__dict__[_IGNORED] = known


def stays_out_of_ddp(model: nn.Module) -> frozenset[str]:
    """Return the names of parameters that a DistributedDataParallel leaves out."""
    return frozenset(model.__dict__.get(_IGNORED, ()))


def take_back_from_ddp(model: nn.Module) -> None:
    """Undo `leave_out_of_ddp`."""
    model.__dict__.pop(_IGNORED, None)


def level(wrapper: DistributedDataParallel, tensors: Iterable[Tensor]) -> None:
    """Let all ranks have what the first has, as a wrapper does for what it has not left out."""
    group: Any = wrapper.process_group
    for tensor in tensors:
        distributed.broadcast(tensor, distributed.get_global_rank(group, 0), group)


def is_zero(parameter: Tensor) -> bool:
    """Whether DeepSpeed ZeRO has laid a parameter out anew."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def only_announces(hook: Any) -> bool:
    """Whether a hook on a result does not look at the gradient: FSDP2's, which has weights gathered
    before a backward comes to them, and Fabric's, which asks who has called backward."""
    owner = getattr(hook, "__self__", None)
    if type(owner).__module__.startswith("torch.distributed.fsdp."):
        return True
    return getattr(getattr(hook, "func", None), "__module__", "") == "lightning_fabric.wrappers"
