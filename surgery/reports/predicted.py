"""What passes would do, without doing it: works on the meta device, runs no arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from surgery.catalogue import resolve
from surgery.compat.dynamo import Backend
from surgery.contract.options import briefly
from surgery.engine.decide import decide
from surgery.errors import OptimizerError, OptionError, in_a_line
from surgery.kernels.plan import Compile
from surgery.memory import Bytes
from surgery.prediction.devices import device_named
from surgery.prediction.loop import Loop, Step, Wrap, foresee, own_loss
from surgery.prediction.optimizers import Making
from surgery.prediction.sources import Source, batch_for, model_of, shape_of
from surgery.ranks import is_joined
from surgery.reports.holding import bytes_of
from surgery.reports.table import Report


def plan(
    model: Source,
    batch: Mapping[str, Any] | tuple[int, int] | None,
    spec: Any,
    *,
    backend: Backend | None = None,
    compile: Compile = "auto",
    optimizer: Making = torch.optim.AdamW,
    loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
    device: str | None = None,
    world: int = 1,
    wrap: Wrap = "fsdp2",
    **options: Any,
) -> Report:
    """Predict the table of `report` for passes that are not applied, and a step's peak and time.

    Changes nothing and runs no arithmetic: one step is simulated on tensors without memory, and
    every storage is counted as it comes and goes. Parameters, gradients and Adam's state are exact.

    model: a model, which may be on the meta device; or a config of transformers, a folder with one,
    or the id of one on the hub. batch: keyword arguments of the model's forward, with labels, on
    any device; or (rows, length) of tokens. With None, only what is held between steps is
    predicted. optimizer: a callable that makes an optimizer of an iterable of parameters; use
    `functools.partial` for options. loss: a function of (model, batch), for a model that computes
    no loss. clip: the norm that gradients are clipped to. autocast: a dtype for the forward.
    device: a name such as "h100", or "here", whose allocator and time are predicted; None counts
    bytes as on a CPU and predicts no time. world: the number of processes, of which the first is
    counted. wrap: how they share the model: "fsdp2" shards each block and then the whole model,
    "ddp" copies it. With several processes, parameters, gradients and state are those held during
    the step, and communication takes no time. The other arguments are those of `apply`; what a
    `backend` compiles is counted as it is before compilation.

    Raises what `apply` raises; OptionError for an unknown device or an impossible world;
    OptimizerError if the optimizer does not accept the trained parameters.
    """
    check_world(world, wrap, batch)
    model = model_of(model)
    passes = resolve(spec, options)
    decision = decide(model, passes, backend, data=False, compile=compile)
    weights = [p for p in model.parameters() if p.requires_grad]
    before, after = bytes_of(decision, weights)
    loop = Loop(
        loss=loss or own_loss,
        optimizer=optimizer,
        clip=clip,
        autocast=autocast,
        device=device_named(device),
        world=world,
        wrap=wrap,
    )
    lines: list[tuple[str, str]] = []
    if world > 1:
        lines.append(("world", f"the first of {world} processes, {wrap}"))
    then = now = None
    if batch is not None:
        given = batch_for(model, batch, loss)
        if (shape := shape_of(given)) is not None:
            lines.append(("batch", f"rows: {shape[0]:,}, length: {shape[1]:,}"))
        then = _played(model, given, (), loop, lines)
        now = _played(model, given, passes, loop, lines)
    if device is not None:
        lines.append(("device", device))
    for entry, method in zip(decision.passes, decision.methods, strict=True):
        counts = method in decision.rewriting and not method.coordinates  # in graphs: none is here
        said = now.said[method.name] if counts and now is not None else ()
        lines += [("pass", briefly(entry)), *(said if counts else method.lines())]
    return Report(
        title=f"{type(model).__name__}: predicted, nothing was changed",
        lines=tuple(lines),
        before=_with(before, then, world > 1),
        after=_with(after, now, world > 1),
        measured=False,
        holders=now.holders if now is not None else (),
        passes=tuple(entry.name for entry in decision.passes),
    )


def _played(
    model: nn.Module, batch: Mapping[str, Any], passes: Any, loop: Loop, lines: list[Any]
) -> Step | None:
    try:
        return foresee(model, batch, passes, loop)
    except OptimizerError:
        raise
    except Exception as error:  # of a model's own code, of any kind
        what = "with the passes" if passes else "without the passes"
        said = in_a_line(error, 300)
        reason = f"a step {what} cannot be simulated: {type(error).__name__}: {said}"
        lines.append(("peak not predicted", reason))
        return None


def check_world(world: int, wrap: Wrap, batch: object) -> None:
    """Raise OptionError for a world that cannot be simulated."""
    if type(world) is not int or world < 1:
        raise OptionError(f"world={world!r} must be a number of processes, 1 or more.")
    if wrap not in get_args(Wrap):
        raise OptionError(f"wrap={wrap!r} must be one of {', '.join(map(repr, get_args(Wrap)))}.")
    if world > 1 and batch is None:
        raise OptionError("world= needs a batch: what each process holds depends on the step.")
    if world > 1 and wrap == "fsdp2" and is_joined():
        raise OptionError(
            "this process has joined a process group already, and can be in one only: plan "
            "before torch.distributed.init_process_group."
        )


def _with(held: Bytes, step: Step | None, several: bool) -> Bytes:
    if step is None:
        return held
    if several:
        held = Bytes(
            parameters=step.held.get("weights", 0),
            gradients=step.held["gradients"],
            optimizer=step.held.get("optimizer", 0),
        )
    return replace(
        held,
        activations=step.activations,
        peak=step.peak,
        phase=step.phase,
        milliseconds=step.milliseconds,
    )
