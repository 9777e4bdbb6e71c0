"""What an nn.Module holds: parameters, children and hooks by name, past its attribute checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
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


def forward_hooks(module: nn.Module) -> Iterator[tuple[int, Callable[..., Any]]]:
    """Return the forward hooks of a module with their keys."""
    yield from list(module._forward_hooks.items())


def take_hook(module: nn.Module, key: int) -> None:
    """Take a forward hook off."""
    del module._forward_hooks[key]


def put_hook(module: nn.Module, key: int, hook: Callable[..., Any]) -> None:
    """Put a forward hook back under its key."""
    module._forward_hooks[key] = hook


class Unsaved(nn.Module):
    """A module that checkpoints neither see nor miss."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save nothing."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Expect nothing."""
