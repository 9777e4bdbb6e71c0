"""The note on an error of the allocator: what held the memory, and what would have saved it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from surgery.catalogue import resolve
from surgery.compat.tensors import each
from surgery.engine.exhausted import Call, Shape, explain_by, explained, hear_steps, noted
from surgery.errors import ModelError, SurgeryError
from surgery.memory import loss_of, megabytes
from surgery.prediction.loop import Loop, foresee
from surgery.prediction.skeleton import without_surgery
from surgery.prediction.timeline import Holder

LARGEST = 3
PATIENCE = 60.0  # seconds: no further way is tried after these, one takes seconds to half a minute
# What is tried on top of the passes that are there: exact ones first.
WAYS: tuple[tuple[str, ...], ...] = (
    ("recompute",),
    ("chunked_loss",),
    ("recompute", "chunked_loss"),
    ("misa",),
)


def explain(call: Call, phase: str) -> str:
    """Return the text of the note; see `surgery.explain_oom`."""
    began = time.perf_counter()
    model, passes = call.model, ()
    if call.surgery is not None:
        model = without_surgery(call.surgery)
        passes = call.surgery.decision.passes
    loop = Loop(loss=_loss, optimizer=_optimizer(call), autocast=call.autocast)
    with torch.enable_grad():
        now = foresee(model, _batch(call), passes, loop)
        names = [options.name for options in passes]
        with_passes = f" with {', '.join(names)}" if names else ""
        lines = [
            f"{f'in {phase} of' if phase else 'in'} a step of {type(call.model).__name__}"
            f"{with_passes} whose peak, {megabytes(now.peak)}, "
            f"is in {now.phase}. What holds the most then:",
            *(f"  {_told(holder)}" for holder in now.holders[:LARGEST]),
            "What would take bytes off that peak:",
        ]
        saved = []
        for what, batch, more in _ways(call, passes, names):
            if time.perf_counter() - began > PATIENCE:
                break
            try:
                then = foresee(model, batch, [*passes, *more], loop)
            except SurgeryError:
                continue  # a pass that this model, or the others on it, has no room for
            saved.append((now.peak - then.peak, what, then))
    saved = sorted((each for each in saved if each[0] > 0), key=lambda each: -each[0])
    lines += [f"  {megabytes(less)} less, {megabytes(s.peak)}: {what}" for less, what, s in saved]
    return "\n".join(lines if saved else lines[:-1])


@contextmanager
def explain_oom(model: nn.Module) -> Iterator[None]:
    """Explain an out-of-memory error inside: what held the memory, and what would have saved it.

    Use it around a plain training loop of a model without surgery; a model with surgery explains
    such errors by itself. A torch.OutOfMemoryError, or the RuntimeError of the CPU's allocator, is
    raised further with a note (`error.__notes__`). The note names what holds the most at the peak
    of a step of the last batch, by module and operation, and how much lower the peak would be with
    certain passes, or with half of the batch. The step is simulated on tensors without memory,
    which takes from seconds to a minute. Raises ModelError if `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"explain_oom(model) takes an nn.Module, not a {type(model).__name__}.")

    def before(model: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            noted(model, None, args, kwargs)

    hear_steps()
    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with explained(""):
            yield
    finally:
        handle.remove()


explain_by(explain)


def _told(holder: Holder) -> str:
    return f"{megabytes(holder.bytes)}: {holder}"


def _ways(
    call: Call, passes: Sequence[Any], names: Sequence[str]
) -> Iterator[tuple[str, Mapping[str, Any], Sequence[Any]]]:
    rows = _rows(call)
    if rows is not None and rows > 1:
        yield f"{rows // 2} rows in a batch, not {rows}", _batch(call, rows // 2), ()
    for way in WAYS:
        new = [name for name in way if name not in names]
        if len(new) == len(way):
            more = [resolve(name, {})[0] for name in new]
            verb = " + ".join(new)
            yield f"{'also ' if names else ''}the pass {verb}", _batch(call), more


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    args = [batch[key] for key in batch if key.isdigit()]
    return loss_of(model(*args, **{k: v for k, v in batch.items() if not k.isdigit()}))


def _batch(call: Call, rows: int | None = None) -> dict[str, Any]:
    """Return the arguments of a call as a batch without memory, those by place under numbers."""
    had = _rows(call)

    def made(value: Any) -> Any:
        if not isinstance(value, Shape):
            return value
        size = value.size
        if rows is not None and size and size[0] == had:
            size = (rows, *size[1:])
        return torch.empty_strided(size, value.stride, dtype=value.dtype, device="meta")

    numbered = {str(i): arg for i, arg in enumerate(call.args)}
    return each(made, numbered | dict(call.kwargs))


def _rows(call: Call) -> int | None:
    """Return the first dimension of all that have two or more; None if it is not one."""
    found = set()
    each(
        lambda v: found.add(v.size[0]) if isinstance(v, Shape) and len(v.size) > 1 else None,
        (call.args, dict(call.kwargs)),
    )
    return found.pop() if len(found) == 1 else None


def _optimizer(call: Call) -> Any:
    """Return what makes an optimizer like the one that has stepped the model; AdamW before that."""
    known: list[Optimizer] = list(call.surgery.clock.optimizers) if call.surgery else []
    if not known or type(known[0]).__module__.split(".")[0] != "torch":
        return AdamW
    kind = type(known[0])
    taken = inspect.signature(kind).parameters  # AdamW hands one more default to Adam
    options = {key: value for key, value in known[0].defaults.items() if key in taken}
    return lambda parameters: kind(parameters, **options)
