"""What a pass puts on a model beside its own weights: a child with parameters, run by hooks.

A plain forward, `generate`, `state_dict` and `save` have it as they have any child. `export` writes
it into a folder of its own, by a recipe, and the model's own weights as a plain checkpoint.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from surgery.compat import modules
from surgery.errors import ModelError
from surgery.weights.coordinate import Coordinate, densely

RECIPE, WEIGHTS = "recipe.json", "model.safetensors"


class Addition(nn.Module, ABC):
    """A child module that a pass adds to a model.

    key: the name under which the model holds it. resting: whether its hooks do nothing, as if it
    were not there.
    """

    key: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[RemovableHandle] = []
        self.resting = False

    @abstractmethod
    def recipe(self) -> Mapping[str, Any]:
        """Return, as JSON, what is needed to make it again for a model of the same class."""

    @abstractmethod
    def hook(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Register its hooks on the modules of a model, and yield their handles."""

    def put_on(self, model: nn.Module) -> None:
        """Make it a child of a model and register its hooks; all of it, or nothing.

        Raises ModelError for a taken name.
        """
        if hasattr(model, self.key):
            raise ModelError(
                f"{type(model).__name__} has a {self.key!r} already. Take it off first: "
                f"model.{self.key}.take_off(model)."
            )
        model.add_module(self.key, self)
        try:
            for handle in self.hook(model):
                self.handles.append(handle)
        except BaseException:
            self.take_off(model)
            raise

    def take_off(self, model: nn.Module) -> None:
        """Remove it and its hooks from a model. Nothing happens if it is not on the model."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if modules.child(model, self.key) is self:
            modules.take_child(model, self.key)


def trained_in(addition: Addition, names: Iterable[str]) -> list[Coordinate]:
    """Return coordinates for parameters of an addition, trained in every step; see `densely`.

    names: the names of the parameters within the addition.
    """
    found = densely(addition, names)
    for each in found:
        each.weight = f"{addition.key}.{each.weight}"
    return found


def on(model: nn.Module) -> list[Addition]:
    """Return what is on a model now."""
    return [child for child in model.children() if isinstance(child, Addition)]


def named(additions: Iterable[Addition]) -> dict[str, nn.Parameter]:
    """Return the parameters by the names that they have, or would have, on the model."""
    return {f"{each.key}.{name}": p for each in additions for name, p in each.named_parameters()}


def owner_of(model: nn.Module, additions: Iterable[Addition], name: str) -> nn.Module:
    """Return the module that holds a parameter, on the model or on what it will have."""
    path = name.rpartition(".")[0]
    for each in additions:
        if f"{path}.".startswith(f"{each.key}."):
            return each.get_submodule(path[len(each.key) + 1 :])
    return model.get_submodule(path)


@contextmanager
def at_rest(additions: Iterable[Addition]) -> Iterator[None]:
    """Let forwards inside be those of the model without them."""
    awake = [each for each in additions if not each.resting]
    for each in awake:
        each.resting = True
    try:
        yield
    finally:
        for each in awake:
            each.resting = False


@contextmanager
def left_out(model: nn.Module) -> Iterator[None]:
    """Let a model list its own weights alone, inside; its hooks stay."""
    with modules.without_children(model, {each.key for each in on(model)}):
        yield


def write(
    model: nn.Module, state: Mapping[str, Tensor] | None, folder: Path
) -> dict[str, Tensor] | None:
    """Write what is on a model into folders in a folder, each under its key: the weights as
    safetensors, the recipe as JSON.

    state: of the whole model, where the model itself holds parts only. Returns the rest of it.
    """
    rest = None if state is None else dict(state)
    for each in on(model):
        if rest is None:
            own = dict(each.state_dict())
        else:
            names = [name for name in rest if name.startswith(f"{each.key}.")]
            own = {name[len(each.key) + 1 :]: rest.pop(name) for name in names}
        (folder / each.key).mkdir()
        save_file({n: t.contiguous() for n, t in own.items()}, folder / each.key / WEIGHTS)
        recipe = json.dumps(dict(each.recipe()), indent=2)
        (folder / each.key / RECIPE).write_text(f"{recipe}\n")
    return rest


def read_addition(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the recipe and the weights of an addition from its folder in an export."""
    folder = Path(folder)
    return json.loads((folder / RECIPE).read_text()), load_file(folder / WEIGHTS)
