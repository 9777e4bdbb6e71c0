"""Passes by name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from surgery.errors import OptionError

_PASSES: dict[str, type] = {}
_FIRST: list[Callable[[], Any]] = []  # what registers passes whose names others must not take

C = TypeVar("C")


def comes_first(load: Callable[[], Any]) -> None:
    """Let `load` register its passes before any other class can take their names."""
    _FIRST.append(load)


def register(name: str) -> Callable[[type[C]], type[C]]:
    """Make a pass known by name: `@surgery.register("name")` above its options dataclass.

    Packages announce their passes through the entry point group "surgery.passes". The class is a
    frozen, keyword-only dataclass with a method `start(model)` that changes nothing and returns a
    `surgery.passkit.Method`. Raises OptionError if the name is taken or is not a valid name.
    """

    if not isinstance(name, str) or name == "auto" or not re.fullmatch(r"\w[\w.-]*", name):
        raise OptionError(
            f"{name!r} cannot be the name of a pass. It takes letters, digits, '_', '-' and '.', "
            'and is not "auto", which is surgery.fit\'s choice: @surgery.register("my_pass").'
        )

    def add(cls: type[C]) -> type[C]:
        while _FIRST:
            _FIRST.pop()()
        held = _PASSES.get(name)
        if held is not None and _place(held) != _place(cls):
            raise OptionError(
                f"the pass name {name!r} is taken by {'.'.join(_place(held))}. Give "
                f"{'.'.join(_place(cls))} another: @surgery.register({name + '_2'!r})."
            )
        made = getattr(cls, "__dataclass_params__", None)
        if not dataclasses.is_dataclass(cls) or not getattr(made, "frozen", False):
            raise OptionError(
                f"@surgery.register({name!r}) goes above @dataclass(frozen=True, kw_only=True)."
            )
        if not callable(getattr(cls, "start", None)):
            raise OptionError(
                f"{cls.__name__}, registered as {name!r}, has no start(model), which returns the "
                "state of the pass on a model: a surgery.passkit.Method."
            )
        cls.name = name  # type: ignore[attr-defined]
        _PASSES[name] = cls
        return cls

    return add


def registered() -> Mapping[str, type]:
    """Return the passes that are known so far, by name."""
    return _PASSES


def _place(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__
