"""What an nn.Module holds: parameters, children and hooks by name, past its attribute checks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY


def held(owner: nn.Module, key: str) -> nn.Parameter | None:
    """Return the parameter that a module itself holds under a name now."""
    return owner._parameters.get(key)


def child(owner: nn.Module, key: str) -> nn.Module | None:
    """Return the module that a module itself holds under a name now."""
    return owner._modules.get(key)


def take_child(owner: nn.Module, key: str) -> None:
    """Let a module forget a child; one that is not there is no error."""
    owner._modules.pop(key, None)


def keep(model: nn.Module, name: str, value: Any) -> None:
    """Let the deepcopy of a GraphModule keep an attribute; it drops what is not listed."""
    if isinstance(model, GraphModule):
        model.meta.setdefault(_USER_PRESERVED_ATTRIBUTES_KEY, {})[name] = value


def drop(model: nn.Module, name: str) -> None:
    """Undo `keep`; one that was not kept is no error."""
    if isinstance(model, GraphModule):
        kept = model.meta.get(_USER_PRESERVED_ATTRIBUTES_KEY, {})
        kept.pop(name, None)
        if not kept:
            model.meta.pop(_USER_PRESERVED_ATTRIBUTES_KEY, None)


def is_special(module: nn.Module) -> bool:
    """Whether a module has hooks around its forward, or a forward that is not its class's."""
    return "forward" in vars(module) or any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )


def forward_hooks(module: nn.Module) -> Iterator[tuple[int, Callable[..., Any]]]:
    """Return the forward hooks of a module with their keys."""
    yield from list(module._forward_hooks.items())


def take_hook(module: nn.Module, key: int) -> None:
    """Take a forward hook off."""
    del module._forward_hooks[key]


def put_hook(module: nn.Module, key: int, hook: Callable[..., Any]) -> None:
    """Put a forward hook back under its key."""
    module._forward_hooks[key] = hook


def hold(owner: nn.Module, key: str, parameter: nn.Parameter) -> None:
    """Let a module hold a parameter under a name with dots, as `register_parameter` does not."""
    owner._parameters[key] = parameter


class _Current(dict[str, nn.Parameter]):
    """Parameters of a module that are brought up to date before they are listed."""

    def __init__(self, update: Callable[[], None]) -> None:
        super().__init__()
        self.update_first = update

    def items(self) -> Any:
        self.update_first()
        return super().items()


def hold_current(owner: nn.Module, update: Callable[[], None]) -> None:
    """Let a module call `update` before anyone lists its parameters."""
    if not isinstance(owner._parameters, _Current):
        owner.__dict__["_parameters"] = _Current(update)


def hold_as_ever(owner: nn.Module) -> None:
    """Undo `hold_current`."""
    if isinstance(owner._parameters, _Current):
        owner.__dict__["_parameters"] = dict(dict.items(owner._parameters))


def look_up(owner: nn.Module, name: str) -> Any:
    """Return what is meant by the first part of a dotted name: as if there were modules."""
    held = owner.__dict__
    for kind in ("_parameters", "_buffers", "_modules"):
        if name in held.get(kind, ()):
            return held[kind][name]
    if any(key.startswith(f"{name}.") for key in held.get("_parameters", ())):
        return Path(owner, name)
    raise AttributeError(f"{type(owner).__name__} has no attribute {name!r}")


class Path(nn.Module):
    """The beginning of a dotted name of a parameter, on the way to it."""

    def __init__(self, owner: nn.Module, prefix: str) -> None:
        super().__init__()
        self.__dict__["_way"] = owner, prefix

    def __getattr__(self, name: str) -> Any:
        owner, prefix = self.__dict__["_way"]
        return look_up(owner, f"{prefix}.{name}")


@contextmanager
def without(owner: nn.Module, parameters: Container[int]) -> Iterator[None]:
    """Let a module and its children not hold parameters, by their ids, for the time being."""
    held = [(module, module._parameters) for module in owner.modules()]
    try:
        for module, own in held:
            kept = {key: p for key, p in own.items() if id(p) not in parameters}
            module.__dict__["_parameters"] = kept
        yield
    finally:
        for module, own in held:
            own.update(module._parameters)
            module.__dict__["_parameters"] = own


def deepcopied(module: Any, memo: dict[int, Any]) -> Any:
    """Return the copy of a module as `copy.deepcopy` makes it of one without `__deepcopy__`."""
    kind: Any = type(module)
    made = memo[id(module)] = kind.__new__(kind)
    made.__setstate__(copy.deepcopy(module.__dict__, memo))
    return made


class Unsaved(nn.Module):
    """A module that checkpoints neither see nor miss."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save nothing."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Expect nothing."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.change(fn, lambda: super(Unsaved, self)._apply(fn, recurse))
        return self

    def change(self, fn: Callable[[Tensor], Tensor], each: Callable[[], Any]) -> None:
        """Apply a function (`.to`, `.half`) to all tensors; `each` does it one by one."""
        each()
