"""What passes would do, without doing it: works on the meta device, runs no arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from surgery.catalogue import resolve
from surgery.compat.dynamo import Backend
from surgery.compat.tensors import fakes, storage_of
from surgery.contract.method import overrides
from surgery.engine.decide import Decision, decide
from surgery.kernels.plan import Compile
from surgery.memory import Bytes, loss_of
from surgery.reports.holding import bytes_of
from surgery.reports.table import Report


def plan(
    model: nn.Module,
    batch: Mapping[str, Any] | None,
    spec: Any,
    *,
    backend: Backend | None = None,
    compile: Compile = "auto",
    **options: Any,
) -> Report:
    """Predict the table of `report` for passes that are not applied; changes nothing.

    model: may be on the meta device. batch: keyword arguments of its forward, with labels, on any
    device, or None to leave the activations out. The rest: as `apply` takes it.
    Parameters, gradients and Adam's state are exact; activations are the distinct storages that
    eager autograd would save, with the first round's weights trained. Of passes that rewrite the
    graph they are not predicted: nothing is captured. Raises what `apply` raises.
    """
    decision = decide(model, resolve(spec, options), backend, data=False, compile=compile)
    weights = [p for p in model.parameters() if p.requires_grad]
    before, after = bytes_of(decision, weights)
    lines = [("plan", "nothing was changed")]
    rewriting = [
        m.name for m in decision.methods if overrides(m, "rewrite") or overrides(m, "drive")
    ]
    if rewriting:
        unknown = f"not predicted for {', '.join(rewriting)}; surgery.report measures them"
        lines.append(("activations", unknown))
    elif batch is not None:
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        before = _with(before, _saved(model, batch, flags))
        after = _with(after, _saved(model, batch, _trained(decision, flags)))
    for entry, method in zip(decision.passes, decision.methods, strict=True):
        lines += [("pass", repr(entry)), *method.lines()]
    return Report(
        title=f"plan for {type(model).__name__}",
        lines=tuple(lines),
        before=before,
        after=after,
        measured=False,
    )


def _with(held: Bytes, activations: int) -> Bytes:
    return Bytes(**vars(held) | {"activations": activations})


def _trained(decision: Decision, flags: Mapping[str, bool]) -> Mapping[str, bool]:
    """Return which weights get gradients in the first round."""
    if not decision.sites:
        return flags
    return dict.fromkeys(flags, False) | {c.weight: True for c in decision.coordinates if c.active}


def _saved(model: nn.Module, batch: Mapping[str, Any], flags: Mapping[str, bool]) -> int:
    """Return the bytes that autograd saves in one forward on tensors without memory.

    Fake CPU tensors, not meta ones: on the meta device attention takes its mathematical form, which
    saves the attention weights, instead of the fused kernel.
    """
    with fakes():
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
    free = {storage_of(t) for t in given if isinstance(t, Tensor)}
    held: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        if storage_of(tensor) not in free:
            held[storage_of(tensor)] = tensor.untyped_storage()  # its address is not used again
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(functional_call(model, tensors, kwargs=inputs))
    del loss
    return sum(storage.nbytes() for storage in held.values())
