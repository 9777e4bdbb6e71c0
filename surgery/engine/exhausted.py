"""Memory that runs out in a training step: who tells the user what held it, and with what."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.compat.failures import hear, is_out_of_memory
from surgery.compat.tensors import each, is_playing
from surgery.errors import in_a_line
from surgery.kernels.autocast import cast_now

if TYPE_CHECKING:
    from surgery.engine.surgery import Surgery

TITLE = "Out of memory: "  # how notes begin


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a step without memory needs to know of a tensor."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Call:
    """The last training forward of a model. args, kwargs: with `Shape` for tensors. autocast: its
    dtype, None without. surgery: that is on the model."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    autocast: torch.dtype | None
    surgery: Surgery | None


Explain = Callable[[Call, str], str]
_EXPLAIN: list[Explain] = []
_last: list[Callable[[], Call | None]] = []


def explain_by(explain: Explain) -> None:
    """Say who writes the note, of the last forward and the part of the step."""
    _EXPLAIN[:] = [explain]


@contextmanager
def remembered(surgery: Surgery, args: Any, kwargs: Any) -> Iterator[None]:
    """Note a training forward, and explain an error of the allocator out of it."""
    if is_playing():
        yield
        return
    noted(surgery.decision.model, surgery, args, kwargs)
    with explained("forward"):
        yield


def noted(model: nn.Module, surgery: Surgery | None, args: Any, kwargs: Any) -> None:
    """Remember a training forward, without keeping its tensors or its model alive."""
    shapes = each(_shape, (tuple(args), dict(kwargs)))
    kind = next((p.device.type for p in model.parameters()), "cpu")
    dtype = cast_now(kind).dtype
    model_alive = weakref.ref(model)
    surgery_alive = weakref.ref(surgery) if surgery is not None else None

    def call() -> Call | None:
        alive = model_alive()
        on_it = surgery_alive() if surgery_alive is not None else None
        if alive is None or (surgery_alive is not None and on_it is None):
            return None
        args, kwargs = shapes
        return Call(model=alive, args=args, kwargs=kwargs, autocast=dtype, surgery=on_it)

    _last[:] = [call]


@contextmanager
def explained(phase: str) -> Iterator[None]:
    """Add a note to an error of the allocator that passes; phase: of the step, "" if unknown."""
    try:
        yield
    except Exception as error:
        add(error, phase)
        raise


def add(error: BaseException, phase: str) -> None:
    """Add the note to an error of the allocator that has none yet."""
    notes = getattr(error, "__notes__", ())
    if not is_out_of_memory(error) or any(note.startswith(TITLE) for note in notes):
        return
    call = _last[0]() if _last else None
    if call is None or not _EXPLAIN:
        return
    try:
        text = _EXPLAIN[0](call, phase)
    except Exception as other:  # of the model's own code: the user's error must not be lost
        said = in_a_line(other, 200)
        text = f"what held it cannot be told, since the step cannot be simulated: {said}"
    error.add_note(TITLE + text)


def hear_steps() -> None:
    """Hear of errors in the backwards and the optimizers' steps of this process from now on."""
    hear(_in_backward, _in_step)


def _in_backward(error: BaseException) -> None:
    add(error, "backward")


def _in_step(error: BaseException) -> None:
    add(error, "step")


def _shape(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return Shape(size=tuple(value.shape), stride=value.stride(), dtype=value.dtype)
