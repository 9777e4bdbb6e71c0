"""Passes by name: the registry, and options checked before anything happens."""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from surgery.errors import OptionError, near_misses

_PASSES: dict[str, type] = {}


C = TypeVar("C")


def register(name: str) -> Callable[[type[C]], type[C]]:
    """Make a pass known by name: `@surgery.register("name")` above its options dataclass.

    Packages announce theirs through the entry point group "surgery.passes". The class is a frozen,
    keyword-only dataclass with a method `start(model)` that changes nothing and returns the state
    described by `surgery.state.Method`. Raises OptionError if another class holds the name.
    """

    def add(cls: type[C]) -> type[C]:
        held = _PASSES.get(name)
        if held is not None and held.__qualname__ != cls.__qualname__:
            raise OptionError(f"the pass name {name!r} is taken by {held.__module__}.")
        if not dataclasses.is_dataclass(cls):
            raise OptionError(
                f"@surgery.register({name!r}) goes above @dataclass(frozen=True, kw_only=True)."
            )
        cls.name = name  # type: ignore[attr-defined]
        _PASSES[name] = cls
        return cls

    return add


def available() -> list[str]:
    """Return the names of all registered passes, sorted."""
    importlib.import_module("passes")
    for entry in entry_points(group="surgery.passes"):
        entry.load()
    return sorted(_PASSES)


def resolve(spec: Any, options: dict[str, Any]) -> tuple[Any, ...]:
    """Turn what `apply` takes (a name, a pass, or a list of these) into checked passes.

    Raises OptionError for an unknown name, an unknown option or a bad value.
    """
    specs = list(spec) if isinstance(spec, Iterable) and not isinstance(spec, str) else [spec]
    if not specs:
        raise OptionError(f"no pass given. Known passes: {', '.join(available())}.")
    if options and (len(specs) > 1 or not isinstance(specs[0], str)):
        raise OptionError(
            f"options {sorted(options)} go with a single pass given by name. Write them into the "
            "pass instead: surgery.apply(model, [passes.Misa(budget=0.01), ...])."
        )
    return tuple(_one(entry, options) for entry in specs)


def _one(entry: Any, options: dict[str, Any]) -> Any:
    known = available()
    if isinstance(entry, str):
        if entry not in known:
            raise OptionError(
                f"unknown pass {entry!r}.{near_misses(entry, known)} Known: {', '.join(known)}."
            )
        cls = _PASSES[entry]
        fields = [field.name for field in dataclasses.fields(cls)]
        for option in options:
            if option not in fields:
                raise OptionError(
                    f"{entry} has no option {option!r}.{near_misses(option, fields)} "
                    f"Its options: {', '.join(fields)}."
                )
        return cls(**options)
    if type(entry) in _PASSES.values():
        return entry
    if isinstance(entry, type) and entry in _PASSES.values():
        raise OptionError(f"{entry.__name__} is a class: write passes.{entry.__name__}().")
    raise OptionError(
        f"{entry!r} is not a pass. Give a name ({', '.join(known)}) or an instance, such as "
        "passes.Misa(budget=0.03)."
    )


def to_json(options: Any) -> dict[str, Any]:
    """Return a pass as JSON: its name and all its options. A function is named, not kept."""
    values = {f.name: _plain(getattr(options, f.name)) for f in dataclasses.fields(options)}
    return {"name": options.name, "options": values}


def from_json(saved: dict[str, Any]) -> Any:
    """Return the pass that `to_json` described.

    Raises OptionError for a name or an option that is unknown here, and for an option that was a
    function.
    """
    options = dict(saved["options"])
    for option, value in options.items():
        if isinstance(value, dict):
            raise OptionError(
                f"{saved['name']}: {option} was the function {value['function']}, which a file "
                f"cannot hold. Give the pass yourself, with {option}=... as it was."
            )
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return _one(saved["name"], given)


def _plain(value: Any) -> Any:
    if callable(value):
        return {"function": f"{value.__module__}.{value.__qualname__}"}
    if isinstance(value, set | frozenset):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


def check_types(options: Any) -> None:
    """Raise OptionError if a field of a pass does not hold a value of its annotated type."""
    for name, expected in get_type_hints(type(options)).items():
        if get_origin(expected) is typing.ClassVar or name not in options.__dataclass_fields__:
            continue
        value = getattr(options, name)
        if not _fits(value, expected):
            words = str(expected).replace("typing.", "").replace("collections.abc.", "")
            words = expected.__name__ if isinstance(expected, type) else words
            raise OptionError(
                f"{options.name}: {name}={value!r} is a {type(value).__name__}; it takes {words}."
            )


def _fits(value: Any, expected: Any) -> bool:
    origin = get_origin(expected)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(expected))
    if origin is Literal:
        return value in get_args(expected)
    if origin is Callable:
        return callable(value)
    if origin is not None:  # Sequence[str]
        entries = isinstance(value, list | tuple | set | frozenset)
        return entries and all(_fits(entry, get_args(expected)[0]) for entry in value)
    if expected in (int, float) and isinstance(value, bool):
        return False
    if expected is float:
        return isinstance(value, int | float)
    return isinstance(value, expected)


def demand(condition: bool, options: Any, message: str) -> None:
    """Raise OptionError(message), prefixed with the pass's name, unless the condition holds."""
    if not condition:
        raise OptionError(f"{options.name}: {message}")
