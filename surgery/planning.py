"""What a pass would do, without doing it: works on the meta device, runs no arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from surgery.coordinates import Piece, unique
from surgery.errors import ModelError
from surgery.memory import Bytes, Report, loss_of
from surgery.registry import resolve


def plan(model: nn.Module, batch: Mapping[str, Any] | None, spec: Any, **options: Any) -> Report:
    """Predict the table of `report` for passes that are not applied; changes nothing.

    model: may be on the meta device. batch: keyword arguments of its forward, with labels, on any
    device, or None to leave the activations out. Parameters, gradients and Adam's state are exact;
    activations are the distinct storages that eager autograd would save, with the first round's
    weights trained. Of passes that rewrite the graph they are not predicted: nothing is captured.
    Raises OptionError, TargetError, ModelError as `apply` does.
    """
    chosen = resolve(spec, options)
    if not list(model.parameters()):
        raise ModelError(f"this {type(model).__name__} has no parameters: nothing to train.")
    methods = [entry.start(model) for entry in chosen]
    pieces: list[Piece] = [piece for method in methods for piece in method.pieces]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    now = dict.fromkeys(flags, False) | {p.weight: True for p in pieces if p.active}
    now = now if pieces else flags
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    total = sum(sizes.values())
    dense = sum(size for name, size in sizes.items() if flags[name])
    active = [p.parameter for p in unique(pieces) if p.active]
    live = sum(p.numel() * p.element_size() for p in active)
    live = live if pieces else dense
    saved = (None, None)
    lines = [("plan", "nothing was changed")]
    rewriting = [method.name for method in methods if method.rewrites or method.alone]
    if rewriting:
        unknown = f"not predicted for {', '.join(rewriting)}; surgery.report measures them"
        lines.append(("activations", unknown))
    elif batch is not None:
        saved = (_saved(model, batch, flags), _saved(model, batch, now))
    for entry, method in zip(chosen, methods, strict=True):
        lines += [("pass", repr(entry)), *method.lines()]
    return Report(
        title=f"plan for {type(model).__name__}",
        lines=tuple(lines),
        before=Bytes(parameters=total, gradients=dense, optimizer=2 * dense, activations=saved[0]),
        after=Bytes(parameters=total, gradients=live, optimizer=2 * live, activations=saved[1]),
        measured=False,
    )


def _saved(model: nn.Module, batch: Mapping[str, Any], flags: Mapping[str, bool]) -> int:
    """Return the bytes that autograd saves in one forward on tensors without memory.

    Fake CPU tensors, not meta ones: on the meta device attention takes its mathematical form, which
    saves the attention weights, instead of the fused kernel.
    """
    with FakeTensorMode():
        tensors = {
            name: _fake(p).requires_grad_(flags[name]) for name, p in model.named_parameters()
        }
        tensors |= {name: _fake(buffer) for name, buffer in model.named_buffers()}
        inputs = {k: _fake(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return _saved_bytes(model, tensors, inputs)


def _fake(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device="cpu")


def _saved_bytes(model: nn.Module, tensors: dict[str, Tensor], inputs: dict[str, Any]) -> int:
    given = [*tensors.values(), *inputs.values()]
    free = {t.untyped_storage()._cdata for t in given if isinstance(t, Tensor)}
    held: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in free:
            held[storage._cdata] = storage  # kept, so that the address is not used again
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(functional_call(model, tensors, kwargs=inputs))
    del loss
    return sum(storage.nbytes() for storage in held.values())
