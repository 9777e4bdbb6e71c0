"""Models and batches without memory, as they would be."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgery.compat import modules
from surgery.compat.tensors import beside, is_packed, is_wrapper, rebuilt, storage_of
from surgery.engine.surgery import Surgery
from surgery.errors import ModelError
from surgery.weights.table import TABLE

# Of tensors on a stage, whatever the device of a model: on meta, attention takes its mathematical
# form.
HERE = "cpu"


def skeleton(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose tensors have no memory; to be called on a stage.

    Quantised weights are made of the like of what they are made of. Raises ModelError, naming a
    weight of a kind that has its own idea of memory.
    """
    return _copied(model, {}, {}, HERE)


def _copied(
    model: nn.Module, memo: dict[int, Any], flags: Mapping[int, bool], device: str
) -> nn.Module:
    """flags: `requires_grad` of parameters, by their ids, where it is another."""
    own = dict(model.named_parameters())
    for name, parameter in own.items():
        if type(parameter) is not nn.Parameter and not (
            is_wrapper(parameter) or is_packed(parameter)
        ):
            raise ModelError(
                f"{name} is a {type(parameter).__name__}, whose memory is not given by its shape."
            )
        required = flags.get(id(parameter), parameter.requires_grad)
        memo[id(parameter)] = nn.Parameter(_hollow(parameter, device), required)
    for _, buffer in model.named_buffers():
        memo[id(buffer)] = _hollow(buffer, device)
    with _Hollowing(device, [(p, memo[id(p)]) for p in own.values() if beside(p)]):
        copied = copy.deepcopy(model, memo)
        for parameter in own.values():
            vars(memo[id(parameter)]).update(copy.deepcopy(beside(parameter), memo))
    for module in copied.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, FunctionType):  # which deepcopy returns as it is
            module.__dict__["forward"] = _rebound(forward, memo)
    return copied


class _Hollowing(TorchFunctionMode):
    """Copies no tensor with its memory: bitsandbytes keeps scales outside of parameters, and gives
    the bytes of a weight a second name."""

    def __init__(self, device: str, packed: Iterable[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.device = device
        self.known = {storage_of(t): like for t, like in packed}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **kwargs or {})
        like = self.known.get(storage_of(args[0]))
        if like is not None and like.shape == args[0].shape:
            return like.detach()
        return _hollow(args[0], self.device)


def _rebound(function: Any, memo: dict[int, Any]) -> Any:
    """Return a function whose closure holds the copies of what it holds."""
    if isinstance(function, MethodType):
        return MethodType(function.__func__, memo.get(id(function.__self__), function.__self__))
    if not isinstance(function, FunctionType):
        return memo.get(id(function), function)
    if not function.__closure__:
        return function
    if id(function) in memo:
        return memo[id(function)]
    cells = tuple(CellType() for _ in function.__closure__)
    parts = (function.__code__, function.__globals__, function.__name__, function.__defaults__)
    made = memo[id(function)] = FunctionType(*parts, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__ |= function.__dict__
    for own, held in zip(cells, function.__closure__, strict=True):
        with suppress(ValueError):  # a name that nothing was given to yet
            own.cell_contents = _rebound(held.cell_contents, memo)
    return made


def without_surgery(surgery: Surgery) -> nn.Module:
    """Return a copy of the model of a surgery as it would be without, on the meta device.

    What the surgery holds is neither copied nor changed.
    """
    model, dispatch = surgery.decision.model, surgery.dispatch
    memo: dict[int, Any] = {}
    for own in (surgery, *vars(surgery).values(), *dispatch.leaves.values()):
        memo[id(own)] = own
    table = modules.child(model, TABLE)
    if table is not None:
        memo[id(table)] = table
    flags = {id(parameter): required for parameter, required in surgery.flags()}
    copied = _copied(model, memo, flags, "meta")
    modules.take_child(copied, TABLE)
    for module in [model, *dispatch.leaves]:
        memo[id(module)].__dict__.pop("forward", None)
    if dispatch.replaced is not None:
        copied.__dict__["forward"] = copy.deepcopy(dispatch.replaced, memo)
    for module in surgery.decision.workarounds.off:
        memo[id(module)].gradient_checkpointing = True
    for module in copied.modules():
        modules.hold_as_ever(module)
    return copied


def hollow(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch whose tensors have no memory; to be called on a stage."""
    return {k: _hollow(v) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _hollow(t: Tensor, device: str = HERE) -> Tensor:
    if is_wrapper(t):
        return rebuilt(t, partial(_hollow, device=device))
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
