"""What fits into so much memory: every sensible composition played, and one recommended."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from surgery.prediction.loop import Loop, Making, Step, Wrap, foresee, own_loss
from surgery.prediction.sources import Source, batch_for, model_of
from surgery.reports.compositions import GROUPS, Composition
from surgery.reports.predicted import check_world

Goal = Literal["full", "adapter", "forwards"]
SPARE = 0.1  # of the memory: what fragments, other libraries and the next longer batch take


@dataclass(frozen=True, kw_only=True)
class Row:
    """One composition. spec: names of passes, to be applied. peak: bytes, None if it cannot be
    played (`note` says why). activations: bytes that forward leaves for backward. rows, length: the
    most that fit of a batch of this length, of these rows, by how the peak grows with the batch."""

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
class Played:
    """Steps of compositions, group by group; of one that cannot be played, why.

    what, where: the model, the device and the goal in words. shape: of the batch's tokens.
    """

    what: str
    where: str
    shape: tuple[int, int] | None
    groups: tuple[tuple[tuple[Composition, Step | str], ...], ...]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What `surgery.fit` has found; print it. best: the recommended row, None if none fits.
    nearest: that with the lowest peak. memory: bytes. played: what the rows were read from."""

    title: str
    rows: tuple[Row, ...]
    best: Row | None
    nearest: Row
    memory: int
    played: Played = field(repr=False)

    def within(self, memory: int | str) -> Fit:
        """Return what fits into so much memory instead; nothing is played again."""
        return _judged(self.played, memory_of(memory, None))

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
            surgery = Surgery(decide(model, passes, backend, compile=compile))
            surgery.expected = self.best.peak, self.best.activations
            surgery.install()
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
    world: int = 1,
    wrap: Wrap = "fsdp2",
    told: Callable[[Row], Any] | None = None,
) -> Fit:
    """Play all sensible compositions of a goal, and recommend one that fits.

    model, batch, loss, clip, autocast, device, world, wrap: as `surgery.plan` takes them.
    optimizer: too; default: AdamW, SGD for "forwards". memory: bytes of one process, or such as
    "24GiB"; default: the device's.
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
    check_world(world, wrap, batch)
    weights = storage_bytes(model.parameters()) // (world if wrap == "fsdp2" else 1)
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
        world=world,
        wrap=wrap,
    )
    ids = next((v for v in given.values() if isinstance(v, Tensor) and v.ndim == 2), None)
    shape = None if ids is None else (ids.shape[0], ids.shape[1])
    said = (lambda one, step: told(_row(one, step, shape, size))) if told is not None else None
    with captures.kept():
        groups = [tuple(_played(model, given, group, loop, said)) for group in GROUPS[goal]]
    played = Played(
        what=type(model).__name__,
        where="".join(
            [
                f" on {device}" if device else "",
                f", each of {world} by {wrap}" if world > 1 else "",
                f", goal {goal}",
            ]
        ),
        shape=shape,
        groups=tuple(groups),
    )
    return _judged(played, size)


def _played(
    model: nn.Module,
    batch: Mapping[str, Any],
    group: Sequence[Composition],
    loop: Loop,
    said: Callable[[Composition, Step | str], Any] | None,
) -> Iterator[tuple[Composition, Step | str]]:
    for each in group:
        if each.checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
            continue
        try:
            prepare = _checkpoint if each.checkpointing else None
            passes = resolve(list(each.names), {}) if each.names else ()
            step: Step | str = foresee(model, batch, passes, replace(loop, prepare=prepare))
        except SurgeryError as error:  # of a pass that this model is not for
            step = in_a_line(error, 160)
        except Exception as error:  # of a model's own code, of any kind
            step = f"cannot be played: {type(error).__name__}: {in_a_line(error, 120)}"
        if said is not None:
            said(each, step)
        yield each, step


def _judged(played: Played, memory: int) -> Fit:
    """Return what fits. Raises ModelError if nothing could be played."""
    groups = [[_row(*one, played.shape, memory) for one in group] for group in played.groups]
    rows = [row for group in groups for row in group]
    known = [row for row in rows if row.peak is not None]
    if not known:
        raise ModelError(f"no composition could be played for this {played.what}: {rows[0].note}")
    fitting = next((fits for group in groups if (fits := [r for r in group if r.fits])), [])
    return Fit(
        title=f"{played.what} in {_gib(memory)}{played.where}",
        rows=tuple(rows),
        best=min(fitting, key=lambda row: row.milliseconds or 0.0, default=None),
        nearest=min(known, key=lambda row: row.peak or 0),
        memory=memory,
        played=played,
    )


def _row(one: Composition, step: Step | str, shape: tuple[int, int] | None, memory: int) -> Row:
    row = Row(
        spec=one.names,
        checkpointing=one.checkpointing,
        peak=None,
        milliseconds=None,
        fits=False,
        quality=one.quality,
    )
    if isinstance(step, str):
        return replace(row, note=step)
    room = int((1 - SPARE) * memory)
    grown = max(step.most("forward"), step.most("backward"))  # what grows with the batch
    fixed = step.peak - max(grown, step.most("step"))
    share = (room - fixed - step.start) / max(1, grown - step.start)
    small = step.most("step") + fixed <= room and share > 0
    most = None if shape is None else [int(share * n) if small else 0 for n in shape]
    return replace(
        row,
        peak=step.peak,
        milliseconds=step.milliseconds,
        fits=step.peak <= room,
        rows=None if most is None else most[0],
        length=None if most is None else most[1],
        activations=step.activations,
    )


def _checkpoint(model: Any) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})


def _gib(count: int) -> str:
    return f"{count / (1 << 30):,.2f} GiB"
