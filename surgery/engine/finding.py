"""Finding the surgery of a model again, whatever has been put around its forward."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

from surgery.errors import ModelError

if TYPE_CHECKING:
    from surgery.engine.surgery import Surgery

# Of each module of a model, the surgery on it.
_OWNERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Surgery]] = weakref.WeakKeyDictionary()
# Those on models that were copied or unpickled, whose modules are yet to be noted.
_COPIED: weakref.WeakSet[Surgery] = weakref.WeakSet()
# Where those that wrap a function keep it: functools.wraps, partial, accelerate, torch.compile.
_INSIDE = ("__wrapped__", "func", "model_forward", "_torchdynamo_orig_callable", "__self__")


class Forward:
    """What stands in the place of `model.forward` and knows its surgery."""

    surgery: Surgery


def own(surgery: Surgery) -> None:
    """Note that the modules of a model are under a surgery."""
    reference = weakref.ref(surgery)
    for module in surgery.decision.model.modules():
        _OWNERS[module] = reference


def own_later(surgery: Surgery) -> None:
    """`own`, once the copy of a model that is being made is complete."""
    _COPIED.add(surgery)


def disown(surgery: Surgery) -> None:
    """Undo `own`."""
    _COPIED.discard(surgery)
    for module, reference in [*_OWNERS.items()]:
        if reference() is surgery:
            del _OWNERS[module]


def check_alone(model: nn.Module) -> None:
    """Raise ModelError if a module of a model is under the surgery of another model."""
    for name, module in model.named_modules():
        other = _surgery_on(module)
        if other is not None:
            kind = type(other.decision.model).__name__
            passes = ", ".join(options.name for options in other.decision.passes)
            raise ModelError(
                f"{name or 'this model'} is a part of a {kind} that surgery was applied to already "
                f"({passes}), and two surgeries would both train it. Apply to the model that runs "
                "all of it, or call surgery.remove on the other first."
            )


def _surgery_on(module: nn.Module) -> Surgery | None:
    while _COPIED:
        own(_COPIED.pop())
    reference = _OWNERS.get(module)
    return None if reference is None else reference()


def surgery_of(model: nn.Module) -> Surgery | None:
    """Return the surgery that was applied to this model, or to a model inside of it."""
    for module in model.modules():
        known = _surgery_on(module)
        if known is not None and known.decision.model is module:
            return known
        found = _inside(module.__dict__.get("forward"))
        if found is not None:
            return found.surgery
    return None


def _inside(forward: Any) -> Forward | None:
    """Return what of ours is inside of a forward that others have put around it."""
    seen: set[int] = set()
    while forward is not None and id(forward) not in seen:
        if isinstance(forward, Forward):
            return forward
        seen.add(id(forward))
        within = [getattr(forward, name, None) for name in _INSIDE]
        forward = next((w for w in within if callable(w) and not isinstance(w, nn.Module)), None)
    return None


def applied(model: nn.Module) -> Surgery:
    """Return the surgery that was applied to this model, or raise ModelError."""
    surgery = surgery_of(model)
    if surgery is None:
        raise ModelError(
            f"nothing was applied to this {type(model).__name__}. Call surgery.apply(model, ...) "
            "first; surgery.available() lists the passes."
        )
    return surgery
