"""What an nn.Module holds: parameters, children and hooks by name, past its attribute checks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY
from torch.nn.modules import module as torch_module
from torch.nn.utils import stateless
from torch.nn.utils.parametrize import is_parametrized

from surgery.errors import ModelError

_HOOKS_OF_ALL = (  # of torch.nn.modules.module.register_module_...
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


def held(owner: nn.Module, key: str) -> nn.Parameter | None:
    """Return the parameter that a module itself holds under a name now."""
    return owner._parameters.get(key)


def all_held(owner: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """Return the parameters that a module itself holds, as they are at any time."""
    return owner._parameters


def child(owner: nn.Module, key: str) -> nn.Module | None:
    """Return the module that a module itself holds under a name now."""
    return owner._modules.get(key)


def swaps(calls: Iterable[FrameType]) -> bool:
    """Whether one of these calls is torch.func.functional_call, which lends modules tensors."""
    code = stateless._functional_call.__code__
    return any(frame.f_code is code for frame in calls)


class _Same:
    """Equal to what is around the same object."""

    def __init__(self, it: Any) -> None:
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.it is other.it

    def __hash__(self) -> int:
        return id(self.it)


def around_all(kinds: Iterable[type[nn.Module]]) -> tuple[_Same, ...]:
    """Return what runs around or instead of the forwards of all modules of these classes: global
    hooks, and the forwards of the classes. Dynamo does not look at either again."""
    hooks = [*_HOOKS_OF_ALL, *(kind.forward for kind in kinds)]
    found = [[*each.values()] if isinstance(each, dict) else [each] for each in hooks]
    return tuple(_Same(hook) for place in found for hook in (*filter(_is_users, place), None))


@contextmanager
def unwatched() -> Iterator[None]:
    """Take the hooks of torch's own trackers (of modules, of FLOPs) off all modules inside: a graph
    runs no modules, and torch 2.11 would break it at each of them."""
    off = [
        (hooks, key, hook)
        for hooks in _HOOKS_OF_ALL
        for key, hook in [*hooks.items()]
        if not _is_users(hook)
    ]
    for hooks, key, _ in off:
        del hooks[key]
    try:
        yield
    finally:
        for hooks, key, hook in off:
            hooks[key] = hook


def _is_users(hook: Any) -> bool:
    """Whether a hook is not torch's own: its trackers of modules look on, and stop captures."""
    of = getattr(hook, "__module__", None) or ""
    return not of.startswith(("torch.utils.", "torch.distributed."))


def is_computed(owner: nn.Module, key: str) -> bool:
    """Whether a module computes what was its parameter: pruned, normed or parametrized."""
    parts = [f"{key}_orig", f"{key}_g", f"{key}_v"]
    return is_parametrized(owner, key) or any(part in owner._parameters for part in parts)


@contextmanager
def without_children(owner: nn.Module, keys: Container[str]) -> Iterator[None]:
    """Let a module not hold some children for the time being; their order stays."""
    held = dict(owner._modules)
    for key in held:
        if key in keys:
            del owner._modules[key]
    try:
        yield
    finally:
        owner._modules.clear()
        owner._modules.update(held)


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

    def __setattr__(self, name: str, value: Any) -> None:
        owner, prefix = self.__dict__.get("_way", (None, ""))
        if owner is None or not isinstance(value, Tensor):
            super().__setattr__(name, value)
        elif getattr(self, name, None) is not value:
            raise ModelError(
                f"functional_call would replace the coordinate {prefix}.{name}, but forwards read "
                "weights. Give it the weights, by their own names: "
                "{n: p for n, p in model.named_parameters() "
                'if not n.startswith("surgery_coordinates.")}'
            )


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
        if not keep_vars:  # as one who looks at parameters asks for
            self.before_saved()

    def before_saved(self) -> None:
        """Do what is due before a checkpoint is taken."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Expect nothing."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.change(fn, lambda: super(Unsaved, self)._apply(fn, recurse))
        return self

    def change(self, fn: Callable[[Tensor], Tensor], each: Callable[[], Any]) -> None:
        """Apply a function (`.to`, `.half`) to all tensors; `each` does it one by one."""
        each()
