"""PEFT's adapters in exports: the base without them, or with them added to it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.api import remove
from surgery.errors import CheckpointError, OptionError, listed

# What a module of PEFT has put itself around.
# Around tokens it has two names, and the state of one.
_INNER = ("base_layer", "token_adapter", "original_module")


def are_on(model: nn.Module) -> bool:
    """Whether PEFT is around a model."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _inner_of(module: nn.Module) -> str | None:
    """Return under which name a module of PEFT holds what it is around; None for others."""
    if not type(module).__module__.startswith("peft."):
        return None
    return next((n for n in _INNER if isinstance(getattr(module, n, None), nn.Module)), None)


def _wrappers(base: nn.Module) -> dict[str, str]:
    """Return PEFT's modules by name, each with the name of what it has put itself around."""
    found = ((name, _inner_of(module)) for name, module in base.named_modules())
    return {name: inner for name, inner in found if inner is not None}


def base_state(base: nn.Module) -> dict[str, Tensor]:
    """Return the state of a base by its own keys, without what PEFT has put into it."""
    wrappers = _wrappers(base)
    found = {}
    for key, value in base.state_dict().items():
        plain = _plain(key, wrappers)
        if plain is not None:
            found[plain] = value
    return found


def _plain(key: str, wrappers: dict[str, str]) -> str | None:
    """Return a key as it is without PEFT; None for what is PEFT's own."""
    parts, kept = key.split("."), []
    for depth, part in enumerate(parts):
        inner = wrappers.get(".".join(parts[:depth]))
        if inner is None:
            kept.append(part)
        elif part != inner:
            return None
    return ".".join(kept)


def check_mergeable(model: Any) -> None:
    """Raise OptionError if there are no adapters that can be added to a base."""
    if not are_on(model):
        raise OptionError("merge=True adds PEFT adapters to the base, and this model has none.")
    if not hasattr(model.base_model, "merge_and_unload"):
        kind = type(model.active_peft_config).__name__
        raise OptionError(
            f"{kind} adds no weights to the base: its prompts stay beside it. Leave merge=True out."
        )


def check_apart(model: Any) -> None:
    """Raise CheckpointError if the base holds already what its adapters add."""
    base = model.get_base_model()
    added = [n for n in _wrappers(base) if getattr(base.get_submodule(n), "merged", False)]
    if added:
        raise CheckpointError(
            f"the adapters are merged into {listed(added)} (merge_adapter), so base and adapters "
            "written apart would add them twice. Call model.unmerge_adapter() first, or export "
            "with merge=True."
        )


def merged(model: Any) -> Any:
    """Return a copy of the base with the adapters added to it."""
    made: Any = copy.deepcopy(model)
    remove(made)
    _untie(made.get_base_model())
    return made.merge_and_unload()


def _untie(base: Any) -> None:
    """Give a head memory of its own if it shares that of embeddings and one of both is adapted."""
    getters = ("get_input_embeddings", "get_output_embeddings")
    if not all(callable(getattr(base, name, None)) for name in getters):
        return
    both: list[Any] = [getattr(base, name)() for name in getters]
    if None in both:
        return
    embedding, head = map(_innermost, both)
    if embedding.weight is not head.weight or [embedding, head] == both:
        return
    head.weight = nn.Parameter(head.weight.detach().clone())
    base.config.get_text_config().tie_word_embeddings = False
    base.config.tie_word_embeddings = False


def _innermost(module: Any) -> Any:
    while (name := _inner_of(module)) is not None:
        module = getattr(module, name)
    return module


@torch.no_grad()
def check_merged(model: Any, folder: Path) -> None:
    """Raise CheckpointError unless a written model is the live one: every module that PEFT has
    adapted gives what it gives, and every other weight is the same."""
    base = model.get_base_model()
    if not hasattr(type(base), "from_pretrained"):
        return
    written: Any = type(base).from_pretrained(folder, dtype=base.dtype)
    wrappers = _wrappers(base)
    outer = [n for n in wrappers if not any(n.startswith(f"{o}.") for o in wrappers if o != n)]
    for name in outer:
        live = base.get_submodule(name)
        plain = written.get_submodule(_plain(name, wrappers) or name)
        training = live.training
        live.eval()
        x = _probe(_innermost(live))
        close = x is None or _close(live(x), plain.to(_device(live)).eval()(x))
        live.train(training)
        if not close:
            raise _differs(name)
    there = written.state_dict()
    for key, value in base.state_dict().items():
        if any(key.startswith(f"{name}.") for name in outer) or key not in there:
            continue
        if not _close(value, there[key].to(value.device)):
            raise _differs(key)


def _probe(module: nn.Module) -> Tensor | None:
    """Return an input for a module: of a Linear or an embedding."""
    weight = next(module.parameters(), None)
    if weight is None:
        return None
    drawn = torch.Generator().manual_seed(0)
    if isinstance(module, nn.Embedding):
        return torch.randint(module.num_embeddings, (64,), generator=drawn).to(weight.device)
    width = getattr(module, "in_features", None) or getattr(module, "nx", None)
    if not isinstance(width, int) or not weight.is_floating_point():
        return None
    return torch.randn(8, width, generator=drawn).to(weight.device, weight.dtype)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    # Adapters added to 16-bit weights are rounded with them.
    off = float((a.double() - b.double()).norm())
    return off <= max(64 * torch.finfo(a.dtype).eps, 1e-5) * float(a.double().norm()) + 1e-12


def _differs(name: str) -> CheckpointError:
    return CheckpointError(
        f"the merged model would not be the live one: {name} differs in what was written. The old "
        "export is untouched. Leave merge=True out: base and adapters are then written apart."
    )
