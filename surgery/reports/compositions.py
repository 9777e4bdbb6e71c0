"""What `fit` tries for each goal, from what changes nothing to what changes the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

EXACT = "the same gradients"
SAMPLED = "another method: some weights at a time"
MAPPED = "another method: low-rank steps"
ROUNDED = "gradients of rounded activations"
FORWARDS = "another method: slopes of forwards, many more steps"


@dataclass(frozen=True, kw_only=True)
class Composition:
    """Passes by name. quality: what they change of the training."""

    names: tuple[str, ...]
    quality: str = EXACT
    checkpointing: bool = False


_BOTH = ("recompute", "chunked_loss")
# From what changes nothing to what changes the method; each group is tried when none before fits.
_EXACT = (
    Composition(names=()),
    Composition(names=("chunked_loss",)),
    Composition(names=("recompute",)),
    Composition(names=_BOTH),
    Composition(names=(), checkpointing=True),
    Composition(names=("chunked_loss",), checkpointing=True),
    Composition(names=_BOTH, checkpointing=True),
)
_METHODS = (
    Composition(names=("misa",), quality=SAMPLED),
    Composition(names=("misa", *_BOTH), quality=SAMPLED),
    Composition(names=("misa", "chunked_loss"), quality=SAMPLED, checkpointing=True),
    Composition(names=("misa", *_BOTH, "compress"), quality=f"{SAMPLED}; {ROUNDED}"),
    Composition(names=("badam", *_BOTH), quality=SAMPLED),
    Composition(names=("rso", *_BOTH), quality=MAPPED),
    Composition(names=("velora", *_BOTH), quality=MAPPED),
)
_FORWARDS = tuple(
    Composition(names=(name,), quality=FORWARDS)
    for name in ("mezo", "sparse_mezo", "lozo", "subzero")
)
GROUPS: Mapping[str, tuple[tuple[Composition, ...], ...]] = {
    "full": (_EXACT, _METHODS),
    "adapter": (_EXACT,),
    "forwards": (_FORWARDS,),
}
