"""What `fit` tries for each goal, from what changes nothing to what changes the method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from surgery.errors import ModelError
from surgery.prediction.sources import is_adapted

EXACT = "the same gradients"
SAMPLED = "another method: some weights at a time"
MAPPED = "another method: low-rank steps"
ROUNDED = "gradients of rounded activations"
BESIDE = "another method: a side path beside the frozen model"
FORWARDS = "another method: slopes of forwards, many more steps"


@dataclass(frozen=True, kw_only=True)
class Composition:
    """Passes by name. quality: what they change of the training.

    bare: whether they want a model without adapters, and are left out where the user has put some
    on.
    """

    names: tuple[str, ...]
    quality: str = EXACT
    checkpointing: bool = False
    bare: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """One combination of passes.

    spec: the names of the passes, as `surgery.apply` takes them. peak: the peak of a step in bytes;
    None if the step cannot be simulated (`note` says why). activations: the bytes that forward
    keeps for backward. rows, length: the most rows of this length, and the longest rows of this
    number, that fit, judged by how the peak grows with the batch. before: code that comes before
    `apply`.
    """

    spec: tuple[str, ...]
    checkpointing: bool
    peak: int | None
    milliseconds: float | None
    fits: bool
    quality: str
    note: str = ""
    rows: int | None = None
    length: int | None = None
    activations: int | None = None
    before: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        names = [*self.spec, *(["gradient checkpointing"] if self.checkpointing else [])]
        return " + ".join(names) or "as it is"

    @property
    def lines(self) -> str:
        """The lines to paste before the optimizer is built."""
        found = [*self.before]
        if self.checkpointing:
            found.append('model.gradient_checkpointing_enable({"use_reentrant": False})')
        if self.spec:
            found.append(f"surgery.apply(model, {list(self.spec)!r})")
        return "\n".join(found) or "# nothing: it fits as it is"


def check_adapted(model: nn.Module, row: Row) -> None:
    """Raise ModelError if a row is for a model with adapters, and this one has none."""
    if row.before and not is_adapted(model):
        raise ModelError(
            "the recommended combination is for a model with adapters, but nothing of this "
            f"{type(model).__name__} is frozen. First run: {'; '.join(row.before)}"
        )


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
    Composition(names=("galore", *_BOTH), quality=MAPPED),
    Composition(names=("velora", *_BOTH), quality=MAPPED),
)
_FORWARDS = tuple(
    Composition(names=(name,), quality=FORWARDS)
    for name in ("mezo", "sparse_mezo", "lozo", "subzero")
)
GROUPS: Mapping[str, tuple[tuple[Composition, ...], ...]] = {
    "full": (_EXACT, _METHODS),
    "adapter": (
        _EXACT,
        (
            Composition(names=("velora", *_BOTH), quality=MAPPED),
            Composition(names=("sherl", "chunked_loss"), quality=BESIDE, bare=True),
        ),
    ),
    "forwards": (_FORWARDS,),
}
