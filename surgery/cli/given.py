"""What is given as words: passes and optimizers with their options, dtypes."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from surgery.catalogue import resolve
from surgery.errors import OptionError, near_misses

_NOT_IN_A_LOOP = ("Optimizer", "LBFGS", "SparseAdam")  # a base; one needs closures; sparse only
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and name not in _NOT_IN_A_LOOP
}
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def passes_of(words: Sequence[str], options: Iterable[str] = ()) -> list[Any]:
    """Return passes from `name` or `name:option=value,option=value`, each checked.

    options: more `option=value` words, for a single pass. Raises OptionError.
    """
    more = [pair for word in options for pair in _pairs(word)]
    if more and len(words) != 1:
        raise OptionError(
            f"it is not clear which pass {more[0][0]}={more[0][1]!r} is for. "
            f"Write it beside its pass: --pass {(*words, 'name')[0]}:{more[0][0]}={more[0][1]}."
        )
    found = []
    for word in words:
        name, given = _named(word)
        found += resolve(name, given | dict(more))
    return found


def optimizer_of(word: str, **more: Any) -> Callable[[Any], torch.optim.Optimizer]:
    """Return what makes an optimizer, from `adamw` or `sgd:momentum=0.9`. Raises OptionError."""
    name, options = _named(word)
    kind = OPTIMIZERS.get(name.lower())
    if kind is None:
        raise OptionError(
            f"unknown optimizer {name!r}.{near_misses(name, OPTIMIZERS)} Known: "
            f"{', '.join(OPTIMIZERS)}."
        )
    make = partial(kind, **more | options)
    try:
        make([torch.nn.Parameter(torch.zeros(2, 2))])
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"{kind.__name__} does not take {word!r}: {error}") from error
    return make


def dtype_of(word: str | None) -> torch.dtype | None:
    """Return a dtype by its name, None for none. Raises OptionError."""
    if word is None:
        return None
    if word not in DTYPES:
        raise OptionError(f"unknown dtype {word!r}. Known: {', '.join(DTYPES)}.")
    return DTYPES[word]


def _named(word: str) -> tuple[str, dict[str, Any]]:
    name, _, options = word.partition(":")
    return name, dict(_pairs(options)) if options else {}


def _pairs(word: str) -> list[tuple[str, Any]]:
    # A comma before `name=` ends an option; others are of a value, such as targets=["a","b"].
    pairs = []
    for option in re.split(r",(?=\s*\w+=)", word):
        name, equals, value = option.strip().partition("=")
        if not equals:
            raise OptionError(f"{option!r} is not of the form name=value, such as budget=0.01.")
        try:
            pairs.append((name, ast.literal_eval(value)))
        except (ValueError, SyntaxError):
            pairs.append((name, value))
    return pairs
