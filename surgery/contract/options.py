"""Options of a pass: checked before anything happens, and as JSON."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from surgery.errors import OptionError

C = TypeVar("C")


def to_json(options: Any) -> dict[str, Any]:
    """Return a pass as JSON: its name and all its options. A function is named, not kept.

    Raises OptionError for what JSON has no form of.
    """
    values = {f.name: _plain(getattr(options, f.name)) for f in dataclasses.fields(options)}
    for name, value in values.items():
        if isinstance(value, dict | list | str | int | float | None):
            continue
        raise OptionError(
            f"{options.name}: {name}={value!r} is a {type(value).__name__}, which a save cannot "
            "hold. Make it a number or a string, such as the name of what is meant."
        )
    return {"name": options.name, "options": values}


def _plain(value: Any) -> Any:
    if callable(value):
        return {"function": f"{value.__module__}.{value.__qualname__}"}
    if isinstance(value, set | frozenset):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


def renamed(**names: str) -> Callable[[type[C]], type[C]]:
    """Let a pass take options by their earlier names too: `@renamed(old="new")`.

    An old name warns (FutureWarning); both names at once raise OptionError. Saves with the old name
    can still be loaded.
    """

    def change(cls: type[C]) -> type[C]:
        made: Any = cls.__init__

        @functools.wraps(made)
        def init(self: Any, **given: Any) -> None:
            for old in names.keys() & given.keys():
                new = names[old]
                if new in given:
                    raise OptionError(
                        f"{cls.__name__} is given {old}= and {new}=, which are the same option. "
                        f"Leave {old}= out."
                    )
                warnings.warn(
                    f"{old}= of {cls.__name__} is called {new}= now. Write {new}={given[old]!r}.",
                    FutureWarning,
                    stacklevel=2,
                )
            made(self, **by_new_names(cls, given))

        cls.renamed = names  # type: ignore[attr-defined]
        cls.__init__ = init
        return cls

    return change


def by_new_names(cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of a pass under the names that they have now."""
    names = getattr(cls, "renamed", {})
    return {names.get(name, name): value for name, value in given.items()}


def briefly(options: Any) -> str:
    """Return a pass as code, without the options that have their defaults."""
    given = [
        f"{field.name}={getattr(options, field.name)!r}"
        for field in dataclasses.fields(options)
        if getattr(options, field.name) != field.default
    ]
    return f"{options.name}({', '.join(given)})" if given else options.name


def check_types(options: Any) -> None:
    """Raise OptionError if a field of a pass does not hold a value of its annotated type."""
    known = {field.name for field in dataclasses.fields(options)}
    for name, expected in get_type_hints(type(options)).items():
        if name not in known:  # of the class
            continue
        value = getattr(options, name)
        if isinstance(value, Mapping):
            raise OptionError(
                f"{options.name}: {name}={value!r} is a {type(value).__name__}. An option is a "
                "number, a string or a sequence of these, which a save can hold: make one option "
                "of each entry."
            )
        if not _fits(value, expected):
            words = str(expected).replace("typing.", "").replace("collections.abc.", "")
            words = expected.__name__ if isinstance(expected, type) else words
            raise OptionError(
                f"{options.name}: {name}={value!r} is a {type(value).__name__}; it takes {words}."
            )


def _fits(value: Any, expected: Any) -> bool:
    if expected is Any:
        return True
    origin = get_origin(expected)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(expected))
    if origin is Literal:
        return value in get_args(expected)
    if origin is Callable:
        return callable(value)
    if origin is tuple and get_args(expected)[-1] is not Ellipsis:
        right = isinstance(value, list | tuple) and len(value) == len(get_args(expected))
        return right and all(map(_fits, value, get_args(expected)))
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
