"""What fits into so much memory: every sensible composition played, and one recommended."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from surgery.catalogue import resolve
from surgery.compat.dynamo import Backend
from surgery.engine import captures
from surgery.engine.decide import decide
from surgery.engine.surgery import Surgery
from surgery.errors import ModelError, OptionError, SurgeryError, in_a_line
from surgery.kernels.plan import Compile
from surgery.memory import storage_bytes
from surgery.prediction.devices import device_named, memory_of
from surgery.prediction.loop import Loop, Making, Step, foresee, own_loss
from surgery.prediction.sources import Source, batch_for, model_of

Goal = Literal["full", "adapter", "forwards"]
SPARE = 0.1  # of the memory: what fragments, other libraries and the next longer batch take

EXACT = "the same gradients"
SAMPLED = "another method: some weights at a time"
MAPPED = "another method: low-rank steps"
ROUNDED = "gradients of rounded activations"
FORWARDS = "another method: slopes of forwards, many more steps"


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    names: tuple[str, ...]
    quality: str = EXACT
    checkpointing: bool = False


_BOTH = ("recompute", "chunked_loss")
# From what changes nothing to what changes the method; each group is tried when none before fits.
_EXACT = (
    _Candidate(names=()),
    _Candidate(names=("chunked_loss",)),
    _Candidate(names=("recompute",)),
    _Candidate(names=_BOTH),
    _Candidate(names=(), checkpointing=True),
    _Candidate(names=("chunked_loss",), checkpointing=True),
    _Candidate(names=_BOTH, checkpointing=True),
)
_METHODS = (
    _Candidate(names=("misa",), quality=SAMPLED),
    _Candidate(names=("misa", *_BOTH), quality=SAMPLED),
    _Candidate(names=("misa", "chunked_loss"), quality=SAMPLED, checkpointing=True),
    _Candidate(names=("misa", *_BOTH, "compress"), quality=f"{SAMPLED}; {ROUNDED}"),
    _Candidate(names=("badam", *_BOTH), quality=SAMPLED),
    _Candidate(names=("rso", *_BOTH), quality=MAPPED),
    _Candidate(names=("velora", *_BOTH), quality=MAPPED),
)
_FORWARDS = tuple(
    _Candidate(names=(name,), quality=FORWARDS)
    for name in ("mezo", "sparse_mezo", "lozo", "subzero")
)
GROUPS: Mapping[str, tuple[tuple[_Candidate, ...], ...]] = {
    "full": (_EXACT, _METHODS),
    "adapter": (_EXACT,),
    "forwards": (_FORWARDS,),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One composition. spec: names of passes, to be applied. peak: bytes, None if it cannot be
    played (`note` says why). rows, length: the most that fit of a batch of this length, of these
    rows, by how the peak grows with the batch."""

    spec: tuple[str, ...]
    checkpointing: bool
    peak: int | None
    milliseconds: float | None
    fits: bool
    quality: str
    note: str = ""
    rows: int | None = None
    length: int | None = None

    @property
    def title(self) -> str:
        names = [*self.spec, *(["gradient checkpointing"] if self.checkpointing else [])]
        return " + ".join(names) or "as it is"

    @property
    def lines(self) -> str:
        """The lines to paste before the optimizer is built."""
        found = []
        if self.checkpointing:
            found.append('model.gradient_checkpointing_enable({"use_reentrant": False})')
        if self.spec:
            found.append(f"surgery.apply(model, {list(self.spec)!r})")
        return "\n".join(found) or "# nothing: it fits as it is"


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What `surgery.fit` has found; print it. best: the recommended row, None if none fits.
    nearest: that with the lowest peak. memory: bytes."""

    title: str
    rows: tuple[Row, ...]
    best: Row | None
    nearest: Row
    memory: int

    def apply(
        self, model: nn.Module, *, backend: Backend | None = None, compile: Compile = "auto"
    ) -> nn.Module:
        """Apply the recommended composition to a model. Raises ModelError if none fits.

        backend, compile: as `surgery.apply` takes them.
        """
        if self.best is None:
            raise ModelError(
                f"nothing fits into {_gib(self.memory)} with {SPARE:.0%} to spare. The nearest is "
                f"{self.nearest.title}, with {_gib(self.nearest.peak or 0)}: a shorter batch, "
                'goal="forwards", or more memory.'
            )
        if self.best.checkpointing:
            _checkpoint(model)
        if self.best.spec:
            passes = resolve(list(self.best.spec), {})
            Surgery(decide(model, passes, backend, compile=compile)).install()
        elif backend is not None:
            raise OptionError(
                "the recommended composition has no pass, so there is no graph for "
                f"backend={backend!r} to compile. Leave it out, or call torch.compile(model)."
            )
        return model

    def __rich__(self) -> Table:
        table = Table("", "peak", "time", "fits", "rows", "length", "quality", title=self.title)
        for row in self.rows:
            peak = "not known" if row.peak is None else _gib(row.peak)
            time = "" if row.milliseconds is None else f"{row.milliseconds:,.0f} ms"
            size = ["" if n is None else f"{n:,}" for n in (row.rows, row.length)]
            style = "bold" if row is self.best else ""
            said = row.note or row.quality
            table.add_row(
                row.title, peak, time, "yes" if row.fits else "no", *size, said, style=style
            )
        if self.best is not None:
            table.caption = f"Recommended:\n{self.best.lines}"
        else:
            table.caption = f"Nothing fits; the nearest is {self.nearest.title}."
        return table

    def __str__(self) -> str:
        console = Console(width=120, file=io.StringIO())
        with console.capture() as captured:
            console.print(self)
        return captured.get()


def fit(
    model: Source,
    batch: Mapping[str, Any] | tuple[int, int],
    memory: int | str | None = None,
    *,
    device: str | None = None,
    goal: Goal = "full",
    optimizer: Making | None = None,
    loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
    told: Callable[[Row], Any] | None = None,
) -> Fit:
    """Play all sensible compositions of a goal, and recommend one that fits.

    model, batch, loss, clip, autocast, device: as `surgery.plan` takes them. optimizer: too;
    default: AdamW, SGD for "forwards". memory: bytes, or such as "24GiB"; default: the device's.
    goal: "full" trains all weights, "adapter" those that require gradients already, "forwards"
    needs no backward. told: is given each row as it is found.

    Exact passes come first, methods only where none of these fits; of those that fit with a tenth
    to spare, the fastest is recommended, without a device the first. Changes nothing. Raises
    OptionError for an unknown goal, device or unit, or less memory than the weights take.
    """
    known = device_named(device)
    size = memory_of(memory, known)
    if goal not in GROUPS:
        raise OptionError(f"goal={goal!r} must be one of {', '.join(map(repr, GROUPS))}.")
    model = model_of(model)
    weights = storage_bytes(model.parameters())
    if weights > size:
        raise OptionError(
            f"the weights of this {type(model).__name__} alone are {_gib(weights)}, and memory= is "
            f"{_gib(size)}. Load them in fewer bits, or shard them over several devices."
        )
    given = batch_for(model, batch)
    loop = Loop(
        loss=loss or own_loss,
        optimizer=optimizer or (torch.optim.SGD if goal == "forwards" else torch.optim.AdamW),
        clip=clip,
        autocast=autocast,
        device=known,
    )
    rows: list[Row] = []
    best = None
    with captures.kept():
        for group in GROUPS[goal]:
            found = list(_played(model, given, group, loop, size, told))
            rows += found
            fitting = [row for row in found if row.fits]
            if fitting and best is None:
                best = min(fitting, key=lambda row: row.milliseconds or 0.0)
    known_rows = [row for row in rows if row.peak is not None]
    if not known_rows:
        raise ModelError(
            f"no composition could be played for this {type(model).__name__}: {rows[0].note}"
        )
    where = f" on {device}" if device else ""
    return Fit(
        title=f"{type(model).__name__} in {_gib(size)}{where}, goal {goal}",
        rows=tuple(rows),
        best=best,
        nearest=min(known_rows, key=lambda row: row.peak or 0),
        memory=size,
    )


def _played(
    model: nn.Module,
    batch: Mapping[str, Any],
    group: Sequence[_Candidate],
    loop: Loop,
    memory: int,
    told: Callable[[Row], Any] | None,
) -> Iterator[Row]:
    for each in group:
        if each.checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
            continue
        row = Row(
            spec=each.names,
            checkpointing=each.checkpointing,
            peak=None,
            milliseconds=None,
            fits=False,
            quality=each.quality,
        )
        try:
            prepare = _checkpoint if each.checkpointing else None
            passes = resolve(list(each.names), {}) if each.names else ()
            step = foresee(model, batch, passes, replace(loop, prepare=prepare))
            row = _filled(row, step, batch, memory)
        except SurgeryError as error:  # of a pass that this model is not for
            row = replace(row, note=in_a_line(error, 160))
        except Exception as error:  # of a model's own code, of any kind
            said = in_a_line(error, 120)
            row = replace(row, note=f"cannot be played: {type(error).__name__}: {said}")
        if told is not None:
            told(row)
        yield row


def _filled(row: Row, step: Step, batch: Mapping[str, Any], memory: int) -> Row:
    room = int((1 - SPARE) * memory)
    grown = max(step.most("forward"), step.most("backward"))  # what grows with the batch
    fixed = step.peak - max(grown, step.most("step"))
    share = (room - fixed - step.start) / max(1, grown - step.start)
    ids = next((v for v in batch.values() if isinstance(v, Tensor) and v.ndim == 2), None)
    small = step.most("step") + fixed <= room and share > 0
    rows = length = None
    if ids is not None:
        rows = int(share * ids.shape[0]) if small else 0
        length = int(share * ids.shape[1]) if small else 0
    return replace(
        row,
        peak=step.peak,
        milliseconds=step.milliseconds,
        fits=step.peak <= room,
        rows=rows,
        length=length,
    )


def _checkpoint(model: Any) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})


def _gib(count: int) -> str:
    return f"{count / (1 << 30):,.2f} GiB"
