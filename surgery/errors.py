"""Every error of the library, so that one `except SurgeryError` catches them all."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SurgeryError(ValueError):
    """The base of all errors of the library. They are raised before anything is changed."""


class OptionError(SurgeryError):
    """An unknown pass, an unknown option, or a value that an option cannot take."""


class TargetError(SurgeryError):
    """A target that matches nothing, or nothing that the pass could train."""


class ModelError(SurgeryError):
    """A model that cannot be trained as it is: without parameters, on meta, wrapped, or changed."""


class ConflictError(SurgeryError):
    """Passes that cannot be applied together, such as two that train the same weight."""


class CaptureError(SurgeryError):
    """A forward that could not be captured or rewritten, or that hit Dynamo's recompile limit."""


class OptimizerError(SurgeryError):
    """An optimizer that cannot train what the passes want trained."""


class CheckpointError(SurgeryError):
    """A save or export that cannot be written, or a save that is damaged or of another run."""


def near_misses(word: str, known: Iterable[str], count: int = 3) -> str:
    """Return ' Did you mean a, b?' for the nearest of `known`, or an empty string."""
    found = difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
    return f" Did you mean {', '.join(map(repr, found))}?" if found else ""


def listed(names: Iterable[str], most: int = 6) -> str:
    """Join names for a message, the first `most` of them."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def in_a_line(error: BaseException | str, most: int | None = None) -> str:
    """Return what an error says in one line, cut at so many characters."""
    return " ".join(str(error).split())[:most]


def extra(name: str, why: str) -> ModuleNotFoundError:
    """Return the error for what needs more packages than the base installation."""
    return ModuleNotFoundError(f'{why}: pip install "model-surgery[{name}]"')
