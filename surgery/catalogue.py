"""Names to passes: those of this package and of others, found when they are asked for."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Mapping, Set
from dataclasses import MISSING, fields
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any

from surgery.contract.options import by_new_names
from surgery.contract.registry import comes_first, registered
from surgery.errors import OptionError, listed, near_misses

GROUP = "surgery.passes"  # of entry points

comes_first(lambda: importlib.import_module("passes"))


def available() -> list[str]:
    """Return the names of all registered passes, sorted.

    Warns of packages that announce passes but cannot be loaded.
    """
    for package, error in _load_others().items():
        warnings.warn(f"passes of {package} are left out: {error}", RuntimeWarning, stacklevel=2)
    return sorted(_known())


def resolve(spec: Any, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """Turn what `apply` takes (a name, a pass, or a list of these) into checked passes.

    Raises OptionError for an unknown name, an unknown option or a bad value.
    """
    one = isinstance(spec, str | Mapping | Set) or not isinstance(spec, Iterable)
    specs = [spec] if one else list(spec)
    if not specs:
        raise OptionError(f"no pass given. Known passes: {', '.join(_all())}.")
    if options and (len(specs) > 1 or not isinstance(specs[0], str)):
        example = next(iter(options.items()))
        raise OptionError(
            f"options {sorted(options)} go with a single pass given by name. Write them into the "
            f"pass instead, such as passes.Name({example[0]}={example[1]!r})."
        )
    return tuple(_one(entry, options) for entry in specs)


def from_json(saved: Mapping[str, Any]) -> Any:
    """Return the pass that `contract.options.to_json` described.

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
    return _one(saved["name"], by_new_names(_named(saved["name"]), given))


def _one(entry: Any, options: Mapping[str, Any]) -> Any:
    if isinstance(entry, str):
        cls = _named(entry)
        names = [field.name for field in fields(cls)]
        for option in by_new_names(cls, options):
            if option not in names:
                has = f"Its options: {', '.join(names)}." if names else "It has none."
                raise OptionError(
                    f"{entry} has no option {option!r}.{near_misses(option, names)} {has}"
                )
        needed = [f.name for f in fields(cls) if f.default is f.default_factory is MISSING]
        missing = [name for name in needed if name not in options]
        if missing:
            example = ", ".join(f"{name}=..." for name in missing)
            raise OptionError(
                f"{entry} has no default for {listed(missing)}. Give it: surgery.apply(model, "
                f'"{entry}", {example}).'
            )
        return cls(**options)
    known = list(_known().values())
    if type(entry) in known:
        return entry
    if isinstance(entry, type) and entry in known:
        raise OptionError(f"{entry.__name__} is a class: write {entry.__name__}().")
    if callable(getattr(entry, "start", None)):
        kind = type(entry).__name__
        raise OptionError(
            f"{kind} is not registered. Write @surgery.register({kind.lower()!r}) above it."
        )
    raise OptionError(
        f"{entry!r} is not a pass. Give a name ({', '.join(_all())}) or an instance, such as "
        f"passes.{known[0].__name__}()."
    )


def _named(name: str) -> Any:
    """Return the class of a pass. Packages of others are loaded only if it is none of ours."""
    if name in _known():
        return _known()[name]
    broken = _load_others()
    if name in _known():
        return _known()[name]
    lost = "".join(
        f" Passes of {package} could not be loaded: {e}." for package, e in broken.items()
    )
    raise OptionError(
        f"unknown pass {name!r}.{near_misses(name, _known())} Known: {', '.join(_all())}.{lost}"
    )


def _known() -> Mapping[str, type]:
    importlib.import_module("passes")
    return registered()


def _all() -> list[str]:
    _load_others()
    return sorted(_known())


@lru_cache
def _load_others() -> dict[str, str]:
    """Load what other packages announce, once; return the errors of those that are broken."""
    broken = {}
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:  # theirs, of any kind: it must not take our passes with it
            package = entry.dist.name if entry.dist is not None else entry.value
            broken[package] = f"{type(error).__name__}: {error}"
    return broken
