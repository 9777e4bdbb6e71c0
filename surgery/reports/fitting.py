"""What fits into so much memory: every sensible composition played, and one recommended."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from surgery.catalogue import resolve
from surgery.compat.dynamo import Backend
from surgery.compat.hf import checkpoint_blocks
from surgery.engine import captures
from surgery.engine.decide import decide
from surgery.engine.surgery import Surgery
from surgery.errors import ModelError, OptionError, SurgeryError, in_a_line
from surgery.kernels.plan import Compile
from surgery.memory import binary, storage_bytes
from surgery.prediction.devices import device_named, memory_of
from surgery.prediction.loop import Loop, Step, Wrap, foresee, own_loss
from surgery.prediction.optimizers import Making
from surgery.prediction.sources import Source, adapted, batch_for, is_adapted, model_of, shape_of
from surgery.reports.compositions import GROUPS, Composition, Row, check_adapted
from surgery.reports.predicted import check_world

Goal = Literal["full", "adapter", "forwards"]
SPARE = 0.1  # of the memory: what fragments, other libraries and the next longer batch take


@dataclass(frozen=True, kw_only=True)
class Played:
    """Steps of compositions, group by group; of one that cannot be simulated, why.

    what, where: the model, the device and the goal in words. before: the lines that come before
    those of a row. shape: of the batch's tokens.
    """

    what: str
    where: str
    before: tuple[str, ...]
    shape: tuple[int, int] | None
    groups: tuple[tuple[tuple[Composition, Step | str], ...], ...]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What `surgery.fit` has found; print it.

    best: the recommended row, None if none fits. nearest: the row with the lowest peak. memory: the
    memory in bytes. played: the simulated steps that the rows were read from.
    """

    title: str
    rows: tuple[Row, ...]
    best: Row | None
    nearest: Row
    memory: int
    played: Played = field(repr=False)

    def within(self, memory: int | str) -> Fit:
        """Return what fits into another amount of memory; no step is simulated again."""
        return _judged(self.played, memory_of(memory, None))

    def apply(
        self, model: nn.Module, *, backend: Backend | None = None, compile: Compile = "auto"
    ) -> nn.Module:
        """Apply the recommended combination to a model. Raises ModelError if none fits.

        backend, compile: as `surgery.apply` takes them.
        """
        if self.best is None:
            raise ModelError(
                f"nothing fits into {binary(self.memory)} with {SPARE:.0%} to spare. The nearest "
                f"is {self.nearest.title}, with {binary(self.nearest.peak or 0)}. Try a smaller "
                'batch, goal="forwards", or more memory.'
            )
        check_adapted(model, self.best)
        if self.best.checkpointing:
            checkpoint_blocks(model)
        if self.best.spec:
            passes = resolve(list(self.best.spec), {})
            surgery = Surgery(decide(model, passes, backend, compile=compile))
            surgery.expected = self.best.peak, self.best.activations
            surgery.install()
        elif backend is not None:
            raise OptionError(
                "the recommended combination has no pass, so there is no graph for "
                f"backend={backend!r} to compile. Leave it out, or call torch.compile(model)."
            )
        return model

    def __rich__(self) -> Table:
        timed = any(row.milliseconds is not None for row in self.rows)
        head = ["", "peak", *(["time"] if timed else []), "fits", "most rows", "longest row"]
        table = Table(*head, "quality", title=self.title, caption_justify="left")
        for row in self.rows:
            peak = "not known" if row.peak is None else binary(row.peak)
            time = "" if row.milliseconds is None else f"{row.milliseconds:,.0f} ms"
            size = ["" if n is None else f"{n:,}" for n in (row.rows, row.length)]
            numbers = [peak, *([time] if timed else []), "yes" if row.fits else "no", *size]
            style = "bold" if row is self.best else ""
            said = row.note or row.quality
            table.add_row(row.title, *numbers, said, style=style)
        rows, length = self.played.shape or (None, None)
        batch = "" if rows is None else f"Rows: {rows:,}, length: {length:,}. "
        fits = f"{batch}What fits leaves {SPARE:.0%} of the memory free."
        if self.best is not None:
            table.caption = f"{fits}\nRecommended:\n{escape(self.best.lines)}"
        else:
            table.caption = f"{fits}\nNothing fits; the nearest is {self.nearest.title}."
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
    """Simulate a step of every sensible combination of passes, and recommend one that fits.

    Exact passes are tried first, and other methods only if none of those fits. Of the combinations
    that fit with a tenth of the memory to spare, the fastest is recommended; without a device, the
    first. Steps are simulated in training mode. Changes nothing.

    model, batch, loss, clip, autocast, device, world, wrap: as in `surgery.plan`. optimizer: as
    there; by default AdamW, and SGD for "forwards". memory: the bytes of one process, or a text
    such as "24GiB"; by default the device's memory. goal: "full" trains all weights, "adapter"
    those that require gradients already (a model made of a config gets LoRA of rank 16 on every
    Linear, and "sherl" is tried on it without adapters), and "forwards" uses no backward. told: a
    function that is called with each row as it is found.

    Raises OptionError for an unknown goal, device or unit, or for less memory than the weights
    take.
    """
    known = device_named(device)
    size = memory_of(memory, known)
    if goal not in GROUPS:
        raise OptionError(f"goal={goal!r} must be one of {', '.join(map(repr, GROUPS))}.")
    source, model = model, model_of(model)
    before: tuple[str, ...] = ()
    bare = None
    if goal == "adapter" and not is_adapted(model):
        model, before = adapted(model, there=source is model)
        bare = model_of(source)
    check_world(world, wrap, batch)
    weights = storage_bytes(model.parameters()) // (world if wrap == "fsdp2" else 1)
    if weights > size:
        raise OptionError(
            f"the weights of this {type(model).__name__} alone are {binary(weights)}, but memory= "
            f"is {binary(size)}. Load them in fewer bits, or shard them over several devices."
        )
    given = batch_for(model, batch, loss)
    loop = Loop(
        loss=loss or own_loss,
        optimizer=optimizer or (torch.optim.SGD if goal == "forwards" else torch.optim.AdamW),
        clip=clip,
        autocast=autocast,
        device=known,
        world=world,
        wrap=wrap,
    )
    shape = shape_of(given)

    def said(one: Composition, step: Step | str) -> None:
        if told is not None:
            told(_row(one, step, shape, size, before))

    with captures.kept():
        groups = [tuple(_played(model, bare, given, group, loop, said)) for group in GROUPS[goal]]
    played = Played(
        what=type(model).__name__,
        where="".join(
            [
                f" on {device}" if device else "",
                f", each of {world} by {wrap}" if world > 1 else "",
                f", goal {goal}",
            ]
        ),
        before=before,
        shape=shape,
        groups=tuple(groups),
    )
    return _judged(played, size)


def _played(
    model: nn.Module,
    bare: nn.Module | None,
    batch: Mapping[str, Any],
    group: Sequence[Composition],
    loop: Loop,
    said: Callable[[Composition, Step | str], Any],
) -> Iterator[tuple[Composition, Step | str]]:
    for each in group:
        if each.checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
            continue
        if (subject := bare if each.bare else model) is None:
            continue
        try:
            prepare = _checkpointed if each.checkpointing else _trained
            passes = resolve(list(each.names), {}) if each.names else ()
            step: Step | str = foresee(subject, batch, passes, replace(loop, prepare=prepare))
        except SurgeryError as error:  # of a pass that this model is not for
            step = in_a_line(error, 160)
        except Exception as error:  # of a model's own code, of any kind
            step = f"cannot be simulated: {type(error).__name__}: {in_a_line(error, 120)}"
        said(each, step)
        yield each, step


def _judged(played: Played, memory: int) -> Fit:
    """Return what fits. Raises ModelError if nothing could be played."""
    groups = [
        [_row(*one, played.shape, memory, played.before) for one in group]
        for group in played.groups
    ]
    rows = [row for group in groups for row in group]
    known = [row for row in rows if row.peak is not None]
    if not known:
        raise ModelError(f"no combination could be simulated: {played.what}: {rows[0].note}")
    fitting = next((fits for group in groups if (fits := [r for r in group if r.fits])), [])
    return Fit(
        title=f"{played.what} in {binary(memory)}{played.where}",
        rows=tuple(rows),
        best=min(fitting, key=lambda row: row.milliseconds or 0.0, default=None),
        nearest=min(known, key=lambda row: row.peak or 0),
        memory=memory,
        played=played,
    )


def _row(
    one: Composition,
    step: Step | str,
    shape: tuple[int, int] | None,
    memory: int,
    before: tuple[str, ...],
) -> Row:
    row = Row(
        spec=one.names,
        before=() if one.bare else before,
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


def _trained(model: nn.Module) -> None:
    """Play in training mode what `from_pretrained` has left in evaluation mode."""
    if not model.training:
        model.train()


def _checkpointed(model: nn.Module) -> None:
    _trained(model)
    checkpoint_blocks(model)
