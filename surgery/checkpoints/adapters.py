"""PEFT's adapters in exports: the base without them, or with them added to it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from surgery.api import remove
from surgery.compat import hf
from surgery.errors import CheckpointError, OptionError, listed
from surgery.weights.modules import output_head
from surgery.weights.table import TABLE

# What a module of PEFT has put itself around.
# Around tokens it has two names, and the state of one.
_INNER = ("base_layer", "token_adapter", "original_module", "model")


def are_on(model: nn.Module) -> bool:
    """Whether PEFT is around a model, or its adapters in one, by transformers' `add_adapter`."""
    around = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    return around or hf.has_adapters(model)


def base_of(model: Any) -> Any:
    """Return the model that adapters are on."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def of_base(model: Any) -> set[int]:
    """Return the ids of the weights that are the base's and not PEFT's."""
    base = base_of(model)
    wrappers = _wrappers(base)
    return {id(p) for key, p in base.named_parameters() if _plain(key, wrappers) is not None}


def _is_pefts(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.")


def _inner_of(module: nn.Module) -> str | None:
    """Return under which name a module of PEFT holds what it is around; None for others."""
    if not _is_pefts(module):
        return None
    return next((n for n in _INNER if isinstance(getattr(module, n, None), nn.Module)), None)


def _wrappers(base: nn.Module) -> dict[str, str]:
    """Return PEFT's modules by name, each with the name of what it has put itself around."""
    found = ((name, _inner_of(module)) for name, module in base.named_modules())
    return {name: inner for name, inner in found if inner is not None}


def base_state(model: Any) -> dict[str, Tensor]:
    """Return the state of a PEFT model's base by the base's own keys, without what PEFT has put in.

    Raises CheckpointError if PEFT holds weights of the base where they are not looked for.
    """
    base: nn.Module = base_of(model)
    wrappers = _wrappers(base)
    others = {name for name, m in base.named_modules() if _is_pefts(m)} - set(wrappers)
    found, lost = {}, []
    for key, value in base.state_dict().items():
        plain, parts = _plain(key, wrappers), key.split(".")
        if plain is not None and not any(key.startswith(f"{name}.") for name in others):
            found[plain] = value
        elif not any(part in model.peft_config or part.startswith("adaption_") for part in parts):
            lost.append(key)
    if lost:
        raise CheckpointError(
            f"PEFT holds {listed(lost)} in a way that this library does not know, so the base "
            "would lack it. surgery.save keeps it; please report the kind of adapter."
        )
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
        raise OptionError("merge=True adds PEFT adapters to the base, but this model has none.")
    if hf.has_adapters(model):
        raise OptionError(
            "transformers cannot merge adapters that add_adapter has put into a model. Leave "
            "merge=True out, and merge what is written: "
            "PeftModel.from_pretrained(base, folder / 'adapters').merge_and_unload()."
        )
    if not hasattr(model.base_model, "merge_and_unload"):
        kind = type(model.active_peft_config).__name__
        raise OptionError(
            f"{kind} adds no weights to the base: its prompts stay beside it. Leave merge=True out."
        )


def check_apart(model: Any) -> None:
    """Raise CheckpointError if the base holds already what its adapters add, or if of several
    adapters one would be written."""
    if hf.has_adapters(model) and len(model.peft_config) > 1:
        raise CheckpointError(
            f"add_adapter has put the adapters {listed(model.peft_config)} into this model, but "
            "transformers writes only one. Put them around the model instead, "
            "peft.get_peft_model(model, ...), or delete the others: model.delete_adapter(name)."
        )
    base = base_of(model)
    added = [n for n in _wrappers(base) if getattr(base.get_submodule(n), "merged", False)]
    if added:
        raise CheckpointError(
            f"the adapters are merged into {listed(added)} (merge_adapter), so base and adapters, "
            "written separately, would add them twice. Call model.unmerge_adapter() first, or "
            "export with merge=True."
        )


@torch.no_grad()
def check_written(model: Any, folder: Path) -> None:
    """Raise CheckpointError unless every trained tensor of PEFT's is in a file of the folder."""
    own = of_base(model)
    written: dict[torch.Size, list[Tensor]] = {}
    for file in folder.rglob("*.safetensors"):
        for tensor in load_file(file).values():
            written.setdefault(tensor.shape, []).append(tensor)
    for name, weight in model.named_parameters():
        coordinate = TABLE in name.split(".")  # what it stands for is a weight, here or of the base
        if coordinate or id(weight) in own or not weight.requires_grad:
            continue
        if _is_written_otherwise(model, name):
            continue
        if not any(torch.equal(t, weight.to(t)) for t in written.get(weight.shape, ())):
            raise CheckpointError(
                f"{name} is trained, but PEFT has not written it with the adapters. The old export "
                "is untouched. surgery.save keeps it; merge=True adds it to the base."
            )


def _is_written_otherwise(model: Any, name: str) -> bool:
    """Whether PEFT writes what it makes of a weight: prompts are computed, ranks cut, the largest
    of many kept."""
    return "prompt_encoder" in name.split(".") or any(
        config.peft_type == "ADALORA" or getattr(config, "save_only_topk_weights", False)
        for config in model.peft_config.values()
    )


def merged(model: Any) -> Any:
    """Return a copy of the base with the adapters added to it."""
    made: Any = copy.deepcopy(model)
    remove(made)
    _untie(made.get_base_model())
    return made.merge_and_unload()


def _untie(base: Any) -> None:
    """Give a head memory of its own if it shares that of embeddings and one of both is adapted."""
    both: list[Any] = [hf.input_embeddings(base), output_head(base)]
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
        inner = _innermost(live)
        x = _probe(inner)
        close = _same_state(live, plain) if x is None else _gives(live, plain.eval(), x)
        live.train(training)
        if not close:
            raise _differs(name)
    there = written.state_dict()
    for key, value in base.state_dict().items():
        if any(key.startswith(f"{name}.") for name in outer) or key not in there:
            continue
        if not torch.equal(value.to(there[key]), there[key]):  # no adapter has been added to it
            raise _differs(key)


def _probe(module: nn.Module) -> Tensor | None:
    """Return an input for a module: of a Linear, an embedding or a convolution."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    drawn = torch.Generator().manual_seed(0)
    if isinstance(module, nn.Embedding):
        return torch.randint(module.num_embeddings, (64,), generator=drawn).to(weight.device)
    if not weight.is_floating_point():
        return None
    width = getattr(module, "in_features", None) or getattr(module, "nx", None)
    shape: list[Any] = [8, width]
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        reach = [(k - 1) * d + 3 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        shape = [2, module.in_channels, *reach]
    elif not isinstance(width, int):
        return None
    return torch.randn(shape, generator=drawn).to(weight.device, weight.dtype)


def _gives(live: nn.Module, plain: nn.Module, x: Tensor) -> bool:
    """Whether a module gives for `x` what the live one gives, but for rounding."""
    weight: Any = next(live.parameters())
    loaded = next(plain.parameters())  # in the dtype of the base: a head may have more
    a, b = live(x), copy.deepcopy(plain).to(weight.device, weight.dtype)(x)
    if a.shape != b.shape:
        return False
    # Adapters added to 16-bit weights are rounded with them: half an eps, of eleven kinds. With
    # more room a lost adapter would pass.
    eps = max(torch.finfo(each).eps for each in (a.dtype, loaded.dtype))
    size, off = float(a.double().norm()), float((a.double() - b.double()).norm())
    room = max(2 * eps, 1e-5) * size + 1e-12
    if off > room and a.dtype == torch.float32:  # TF32 on GPUs: as far off as this arithmetic is
        exact = plain.cpu().double()(x.cpu() if x.dtype == torch.long else x.cpu().double())
        room += 4 * float((b.cpu().double() - exact).norm())
    return off <= room


def _same_state(live: nn.Module, plain: nn.Module) -> bool:
    """Whether a module that PEFT trains as a whole was written as it is; True for other kinds."""
    saved: Any = getattr(live, "modules_to_save", None)
    if not isinstance(saved, nn.ModuleDict):
        return True
    active: Any = live.active_adapters
    there, trained = plain.state_dict(), saved[active[0]].state_dict()
    return all(torch.equal(value.to(there[key]), there[key]) for key, value in trained.items())


def _differs(name: str) -> CheckpointError:
    return CheckpointError(
        f"the merged model would not be the one in memory: what was written of {name} differs. The "
        "old export is untouched. Leave merge=True out: base and adapters are then written "
        "separately."
    )
