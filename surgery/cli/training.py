"""`surgery train MODEL --data FILE --out FOLDER`: a plain loop that can be stopped and goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import surgery
from surgery.cli import loading, metrics, processes
from surgery.cli.given import dtype_of, optimizer_of, passes_of
from surgery.cli.loop import CHECKPOINT, SHAPE, Loop, rate
from surgery.cli.planning import CLIP, MODEL
from surgery.cli.records import column, records_of
from surgery.cli.rows import Rows, class_rows, language_rows, order
from surgery.cli.screen import err, out
from surgery.cli.settings import Settings, digest, keep
from surgery.cli.stopping import Stopping
from surgery.errors import OptionError, near_misses

EXACT = {"lm": ("recompute", "chunked_loss"), "classify": ("recompute",)}
EXPORTED = "model"
HELD_OUT = 32  # rows, at most, if nobody says how many

_DATA = typer.Option(help="Text, .jsonl (text, prompt and completion, chats), .csv or .tsv.")
_OUT = typer.Option("--out", help="Folder of the run: checkpoint, metrics, picture, trained model.")
_PASSES = typer.Option("--pass", help="As in plan. Without: the exact ones.")
_LEARN = typer.Option(help="Of chats and completions: answers, or all.")
_HELD = typer.Option(help="Rows for evaluation, without a file: a twentieth, at most 32.")
_PACK = typer.Option(help="One document after another in full rows. Without: text is, chats not.")


def train(
    model: Annotated[str, MODEL],
    data: Annotated[Path, _DATA],
    folder: Annotated[Path, _OUT],
    method: Annotated[list[str] | None, _PASSES] = None,
    task: Annotated[str, typer.Option(help="lm, or classify.")] = "lm",
    tokenizer: Annotated[str | None, typer.Option(help="If it is not with the model.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="A file like the data.")] = None,
    held_out: Annotated[int | None, _HELD] = None,
    text_column: str = "text",
    label_column: str = "label",
    learn: Annotated[str, _LEARN] = "answers",
    pack: Annotated[bool | None, _PACK] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    epochs: float = 1.0,
    batch: Annotated[int, typer.Option(help="Rows of a forward.")] = 4,
    accumulate: Annotated[int, typer.Option(help="Forwards of a step.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of a row, at most.")] = 512,
    lr: float = 1e-4,
    warmup: Annotated[int, typer.Option(help="Steps in which the rate rises.")] = 0,
    schedule: Annotated[str, typer.Option(help="cosine, or constant.")] = "cosine",
    optimizer: Annotated[str, typer.Option(help="Of torch.optim: sgd:momentum=0.9.")] = "adamw",
    clip: Annotated[float | None, CLIP] = None,
    dtype: Annotated[str, typer.Option(help="Of weights; auto: the checkpoint's.")] = "auto",
    autocast: Annotated[str | None, typer.Option(help="bfloat16, for forward.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda; a GPU if there is one.")] = None,
    seed: int = 0,
    wrap: Annotated[str, typer.Option(help="Under torchrun: ddp, or fsdp2.")] = "ddp",
    evaluate_every: Annotated[int, typer.Option(help="Steps; 0: at the end only.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps; 0: at the end only.")] = 100,
) -> None:
    """Train; Ctrl-C or SIGTERM saves and ends, and the same command goes on, bit for bit."""
    _choice("--task", task, EXACT)
    _choice("--learn", learn, ("answers", "all"))
    _choice("--schedule", schedule, ("cosine", "constant"))
    _choice("--wrap", wrap, processes.WRAPS)
    _no_float16(dtype, autocast)
    _at_least(1, batch=batch, accumulate=accumulate, length=length, steps=steps)
    if clip is not None and not clip > 0:
        raise OptionError(f"--clip {clip} must be a positive norm.")
    _at_least(0, warmup=warmup, held_out=held_out)
    _at_least(0, evaluate_every=evaluate_every, save_every=save_every, epochs=epochs)
    own = Settings(
        model=model,
        tokenizer=tokenizer,
        task=task,
        data=digest(data),
        evaluation=None if evaluation is None else digest(evaluation),
        held_out=-1 if held_out is None else held_out,
        text_column=text_column,
        label_column=label_column,
        learn=learn,
        pack=pack,
        passes=tuple(method or EXACT[task]),
        steps=steps,
        epochs=epochs,
        batch=batch,
        accumulate=accumulate,
        length=length,
        lr=lr,
        warmup=warmup,
        schedule=schedule,
        optimizer=optimizer,
        clip=clip,
        dtype=dtype,
        autocast=autocast,
        device=_device(device),
        seed=seed,
        processes=processes.world(),
        wrap=wrap,
    )
    with processes.joined(own.device) as here:
        _run(own, here, data, evaluation, folder, evaluate_every, save_every)


def _run(
    own: Settings,
    here: str,
    data: Path,
    evaluation: Path | None,
    folder: Path,
    evaluate_every: int,
    save_every: int,
) -> None:
    make, passes = optimizer_of(own.optimizer, lr=own.lr), passes_of(own.passes)
    first, screen = processes.is_first(), out()
    with err().status("reading the data"):
        words = loading.tokenizer_of(own.tokenizer or own.model)
        rows, held = _rows(own, words, data, evaluation)
    keep(own, folder)
    with err().status(f"loading {own.model}"):
        trained = loading.weights_of(own.model, own.dtype, rows.classes, rows.pad, own.seed)
        largest = max(max(row.ids) for row in [*rows.rows, *held.rows])
        loading.check_length(trained, own.length, largest)
        if first and not (folder / SHAPE).exists():
            loading.keep_shape(trained, words, folder / SHAPE)
        caches = getattr(trained.config, "use_cache", None)
        trained.config.use_cache = False  # under FSDP2, each block would be captured by itself
        surgery.apply(trained.to(here), passes)
        outer = processes.wrapped(trained, own.wrap)
    stepping = make(trained.parameters())
    each = own.batch * own.accumulate * own.processes
    count = own.steps or max(1, math.ceil(own.epochs * len(rows.rows) / each))
    factor = rate(own.schedule, own.warmup, count)
    loop = Loop(
        model=trained,
        outer=outer,
        settings=own,
        rows=rows,
        held=held,
        steps=count,
        optimizer=stepping,
        scheduler=torch.optim.lr_scheduler.LambdaLR(stepping, factor),
        folder=folder,
    )
    _say_what(loop, passes)
    with Stopping() as stop, _progress(loop) as told:
        loop.run(evaluate_every, save_every, told, stop)
    drawn = not first or metrics.picture(loop.metrics.lines, folder / metrics.PICTURE)
    if loop.step < count:
        screen.print(
            f"stopped: step {loop.step} of {count} is in {folder / CHECKPOINT}. Repeat the command "
            "to go on.",
            soft_wrap=True,
        )
        raise typer.Exit(stop.code)
    if caches is not None:
        trained.config.use_cache = caches
    surgery.export(trained, folder / EXPORTED)
    if first:
        words.save_pretrained(folder / EXPORTED)
    screen.print(f"trained: {folder / EXPORTED}, for from_pretrained", soft_wrap=True)
    if not drawn:
        screen.print("no loss.png: pip install matplotlib", soft_wrap=True)


def _rows(own: Settings, words: Any, data: Path, evaluation: Path | None) -> tuple[Rows, Rows]:
    """Return the rows to learn from, and those to evaluate on."""
    records = records_of(data)
    classes: tuple[str, ...] = ()
    if own.task == "classify":
        classes = tuple(sorted(set(column(records, own.label_column, "--label-column"))))

    def read(records: list[dict[str, Any]]) -> Rows:
        if own.task == "classify":
            columns = own.text_column, own.label_column
            return class_rows(records, words, own.length, classes, *columns)
        return language_rows(records, words, own.length, own.pack, own.learn, own.text_column)

    rows = read(records)
    if evaluation is not None:
        return rows, read(records_of(evaluation))
    count = own.held_out if own.held_out >= 0 else min(HELD_OUT, len(rows.rows) // 20)
    if count >= len(rows.rows):
        raise OptionError(f"--held-out {count} of {len(rows.rows)} rows leaves none to learn from.")
    # -1: an order that no epoch has
    mixed = [rows.rows[place] for place in order(len(rows.rows), own.seed, -1)]
    return replace(rows, rows=mixed[count:]), replace(rows, rows=mixed[:count])


def _say_what(loop: Loop, passes: list[Any]) -> None:
    screen = err()
    begun = f", from step {loop.step}" if loop.step else ""
    screen.print(
        f"{len(loop.rows.rows)} rows, {len(loop.held.rows)} held out; {loop.steps} steps{begun}; "
        f"{', '.join(each.name for each in passes)}",
        soft_wrap=True,
    )
    for count, what in (
        (loop.rows.cut, f"rows were cut at {loop.settings.length} tokens: --length"),
        (loop.rows.left_out, "rows left out: nothing to learn was left in them"),
    ):
        if count:
            screen.print(f"[yellow]{count} {what}[/yellow]", soft_wrap=True)


class _progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, loop: Loop) -> None:
        self.screen, self.steps = err(), loop.steps
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(),
            console=self.screen,
            disable=not self.screen.is_terminal,
        )
        self.task = self.bar.add_task("", total=loop.steps, completed=loop.step, said="")

    def __enter__(self) -> Callable[[Mapping[str, Any]], None]:
        self.bar.start()
        return self.told

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()

    def told(self, values: Mapping[str, Any]) -> None:
        step, said = values["step"], _said(values)
        self.bar.update(self.task, completed=step, said=said)
        seldom = step % max(1, self.steps // 20) == 0 or "evaluation" in values
        if not self.screen.is_terminal and seldom:
            self.screen.print(f"step {step} of {self.steps}: {said}", soft_wrap=True)


def _said(values: Mapping[str, Any]) -> str:
    parts = [f"loss {values['loss']:.4f}"]
    if "evaluation" in values:
        parts.append(f"evaluation {values['evaluation']:.4f}")
    if "accuracy" in values:
        parts.append(f"accuracy {values['accuracy']:.1%}")
    parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if values["memory"] is not None:
        parts.append(f"{values['memory'] / 2**30:.2f} GiB")
    return ", ".join(parts)


def _device(word: str | None) -> str:
    word = word or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=word)
    except (RuntimeError, AssertionError) as error:
        said = str(error).splitlines()[0]
        raise OptionError(f"--device {word} cannot be used here: {said}") from error
    return word


def _choice(option: str, word: str, known: Any) -> None:
    if word not in known:
        raise OptionError(
            f"{option} {word!r} is not one of {', '.join(known)}.{near_misses(word, known)}"
        )


def _no_float16(dtype: str, autocast: str | None) -> None:
    kinds = [dtype_of(word) for word in (None if dtype == "auto" else dtype, autocast)]
    if torch.float16 in kinds:
        raise OptionError("float16 needs loss scaling, which train does not do. Use bfloat16.")


def _at_least(least: int, **options: float | None) -> None:
    for name, value in options.items():
        if value is not None and value < least:
            raise OptionError(f"--{name.replace('_', '-')} {value} must be at least {least}.")
