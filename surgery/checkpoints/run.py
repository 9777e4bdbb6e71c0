"""Saving a run and going on with it, to the bit: `surgery.save`, `surgery.load`.

A save holds the weights, the coordinates, what the passes have learned and counted, and the state
of the optimizer and the schedule, all by name. Projections, directions and masks are drawn from
seeds again. The state of torch's own generators (dropout) and of the data loader is the loop's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.catalogue import from_json
from surgery.checkpoints import encoding
from surgery.compat.fsdp import own_class
from surgery.compat.tensors import each as each_leaf
from surgery.contract.options import to_json
from surgery.engine.finding import applied
from surgery.engine.surgery import Surgery
from surgery.errors import CheckpointError, listed
from surgery.ranks import on_first_rank
from surgery.weights import shards
from surgery.weights.coordinate import TABLE, unique


def save(
    model: nn.Module,
    folder: str | Path,
    optimizer: Any = None,
    scheduler: Any = None,
    weights: bool = True,
) -> None:
    """Write all that `surgery.load` needs to go on from here, at any optimizer step.

    optimizer, scheduler: whatever has a state_dict. weights: False leaves them to whoever saves
    them beside; `load` then checks that the model has them. Written in one piece: a save that was
    there before stays intact until the new one is complete. On several ranks all call it, and rank
    0 writes. Gradients of a step under way are not saved. Raises ModelError if nothing was applied,
    CheckpointError if it cannot be written.
    """
    surgery = applied(model)
    if surgery.clock.stepped:
        raise CheckpointError(
            "some of the optimizers of this model have made their step, and others have not. Save "
            "between steps."
        )
    surgery.bind()
    tensors, state = _tensors(surgery.decision.model), state_of(surgery)
    about = about_of(surgery, tensors)
    if weights:
        state["weights"] = encoding.untied(tensors)
    if optimizer is not None:
        state["optimizer"] = _optimizer_state(surgery, optimizer)
    if scheduler is not None:
        state["scheduler"] = dict(scheduler.state_dict())
    sums = {} if weights else _sums(surgery, tensors)
    with on_first_rank() as first:
        whole = each_leaf(partial(shards.gathered, keep=first), state)  # on all ranks
        if first:
            folder.write(Path(folder), about | {"sums": sums}, whole)


@torch.no_grad()
def load(
    model: nn.Module, folder: str | Path, optimizer: Any = None, scheduler: Any = None
) -> nn.Module:
    """Take a model, its passes, an optimizer and a schedule to where they were saved.

    model: of the same architecture, with the same passes applied (`surgery.saved_passes(folder)`).
    optimizer: built from it as it was for the run; False leaves the saved state alone. Returns the
    same model. All or nothing: raises ModelError if nothing was applied, CheckpointError if the
    save is damaged or of another format, architecture, partition or passes, or was made with an
    optimizer or a scheduler that is not given here.
    """
    surgery, folder = applied(model), Path(folder)
    about, state = folder.read(folder)
    check(surgery, about, folder)
    weights = _tensors(surgery.decision.model)
    _check_sums(about["sums"], weights)
    for what, given in (("optimizer", optimizer), ("scheduler", scheduler)):
        if given is None and what in state:
            raise CheckpointError(
                f"{folder} holds the state of {_article(what)}, and none is given. Pass "
                f"{what}={what}, or {what}=False to leave it."
            )
        if given not in (None, False) and what not in state:
            raise CheckpointError(
                f"{folder} was saved without {_article(what)}. Pass {what}=None, and it starts "
                "anew."
            )
    if optimizer not in (None, False):
        optimizer.load_state_dict(_for_optimizer(surgery, optimizer, state["optimizer"]))
    if scheduler not in (None, False):
        scheduler.load_state_dict(deepcopy(state["scheduler"]))
    for name, tensor in state.get("weights", {}).items():
        shards.take(weights[name], tensor)
    restore(surgery, state)
    return model


def saved_passes(folder: str | Path) -> list[Any]:
    """Return the passes of a save, as `surgery.apply` takes them.

    Raises CheckpointError if there is no readable save, OptionError if this library does not know a
    pass or one of its options.
    """
    return [from_json(each) for each in folder.read_record(Path(folder))["passes"]]


def about_of(surgery: Surgery, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Return what a save is of: passes, and shapes of weights and coordinates."""
    tensors = _tensors(surgery.decision.model) if tensors is None else tensors
    return {
        "library": version("model-surgery"),
        "model": own_class(surgery.decision.model).__name__,
        "passes": [to_json(options) for options in surgery.decision.passes],
        "weights": _shapes(tensors),
        "coordinates": _shapes(_coordinates(surgery)),
    }


@torch.no_grad()
def restore(surgery: Surgery, state: Mapping[str, Any]) -> None:
    """Take back what `state_of` returned; coordinates whole, or cut as they are here."""
    surgery.bind()
    own = _coordinates(surgery)
    for name, tensor in state["coordinates"].items():
        if tensor is not own[name]:
            shards.take(own[name], tensor)
    counts = state["surgery"]
    surgery.clock.resume(counts["step"], counts["skipped"])
    for each in surgery.decision.coordinates:
        if each.mapped:
            each.mapped.since = counts["since"][each.name]
        each.parameter.grad = each.norm = None
    for method, saved in zip(surgery.decision.methods, state["passes"], strict=True):
        method.restore(saved)


def state_of(surgery: Surgery) -> dict[str, Any]:
    """Return what a run needs to go on, besides weights and optimizers."""
    return {
        "surgery": {
            "step": surgery.clock.step,
            "skipped": surgery.clock.skipped,
            "since": {c.name: c.mapped.since for c in surgery.decision.coordinates if c.mapped},
        },
        "passes": [method.state() for method in surgery.decision.methods],
        "coordinates": _coordinates(surgery),
    }


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint of the model holds, by name: parameters and persistent buffers."""
    kept = set(model.state_dict(keep_vars=True))
    both = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: tensor for name, tensor in both if name in kept and TABLE not in name}


def _coordinates(surgery: Surgery) -> dict[str, Tensor]:
    """Return the mapped coordinates by name; the others are weights or parts of them."""
    return {c.name: c.parameter for c in unique(surgery.decision.coordinates) if c.mapped}


def _sums(surgery: Surgery, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return checksums of the weights that are trained."""
    # By identity: PEFT renames the weights that it wraps after surgery was applied.
    sites = {id(site.current()) for site in surgery.decision.sites}
    trained = sites or {id(tensor) for tensor in tensors.values() if tensor.requires_grad}
    once = {n: shards.whole(t) for n, t in encoding.untied(tensors).items() if id(t) in trained}
    return {name: encoding.checksum(tensor) for name, tensor in once.items()}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    return {name: [kinds[name], *tensor.shape] for name, tensor in tensors.items()}


def _optimizer_state(surgery: Surgery, optimizer: Any) -> dict[str, Any]:
    """Return an optimizer's state by the names of what it steps."""
    found, own = optimizer.state_dict(), _names(surgery, optimizer)
    groups = [
        {key: value for key, value in group.items() if key != "params"} | {"params": names}
        for group, names in zip(found["param_groups"], own, strict=True)
    ]
    places = _places(found, own)
    states = {places[index]: state for index, state in found["state"].items() if state}
    return {"kind": _kind(optimizer), "groups": groups, "states": states}


def _names(surgery: Surgery, optimizer: Any) -> list[list[str]]:
    """Return the names of the parameters in each group of an optimizer."""
    known = {id(p): name for name, p in _known(surgery).items()}
    strangers = sum(id(p) not in known for g in optimizer.param_groups for p in g["params"])
    if strangers:
        raise CheckpointError(
            f"{_kind(optimizer)} holds {strangers} parameters that are not the model's, so their "
            "state has no name. Make them part of the model, or give them their own optimizer."
        )
    return [[known[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _known(surgery: Surgery) -> dict[str, nn.Parameter]:
    return {n.removeprefix(f"{TABLE}."): p for n, p in surgery.decision.model.named_parameters()}


def _places(found: Mapping[str, Any], names: Iterable[Iterable[str]]) -> dict[Any, str]:
    """Return the name at each index of an optimizer's state_dict."""
    return {
        index: name
        for group, own in zip(found["param_groups"], names, strict=True)
        for index, name in zip(group["params"], own, strict=True)
    }


def _kind(optimizer: Any) -> str:
    return type(getattr(optimizer, "optimizer", optimizer)).__name__  # accelerate's wraps one


def _article(what: str) -> str:
    return "an optimizer" if what == "optimizer" else f"a {what}"


def _for_optimizer(surgery: Surgery, optimizer: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the saved state as this optimizer's load_state_dict takes it. Raises."""
    if saved["kind"] != _kind(optimizer):
        raise CheckpointError(
            f"the save was made with {saved['kind']}, and {_kind(optimizer)} is given. Build the "
            "optimizer as it was, or pass optimizer=False."
        )
    found, own, known = optimizer.state_dict(), _names(surgery, optimizer), _known(surgery)
    by_names = {frozenset(group["params"]): group for group in saved["groups"]}
    groups = []
    for group, names in zip(found["param_groups"], own, strict=True):
        same = by_names.get(frozenset(names))
        if same is None or len(found["param_groups"]) != len(saved["groups"]):
            first = next((n for n in names if not any(n in each for each in by_names)), "")
            raise CheckpointError(
                f"the parameter groups of {_kind(optimizer)} are not those of the save"
                + (f", which has no state for {first}" if first else "")
                + ". Build them from the same parameters as before."
            )
        groups.append({**group, **same, "params": group["params"]})
    states = {
        i: {key: _cut_like(value, known[n]) for key, value in saved["states"][n].items()}
        for i, n in _places(found, own).items()
        if n in saved["states"]
    }
    return {**found, "param_groups": groups, "state": states}


def _cut_like(value: Any, parameter: Tensor) -> Any:
    same = isinstance(value, Tensor) and value.shape == parameter.shape
    return shards.like(value, parameter) if same else value


def check(surgery: Surgery, about: Mapping[str, Any], folder: Any) -> None:
    """Raise CheckpointError if a save is not of this model, its passes and their coordinates."""
    _check_passes(surgery, about["passes"], folder)
    own = about_of(surgery)
    _check_shapes(about["weights"], own["weights"], "weight")
    _check_shapes(about["coordinates"], own["coordinates"], "coordinate")


def _check_passes(surgery: Surgery, saved: list[dict[str, Any]], folder: Any) -> None:
    own = [to_json(options) for options in surgery.decision.passes]
    if own == saved:
        return
    names, others = ([each["name"] for each in passes] for passes in (own, saved))
    if names != others:
        raise CheckpointError(
            f"{folder} was saved with {listed(others)}, and {listed(names)} was applied here. "
            "surgery.apply(model, surgery.saved_passes(folder)) applies what was saved."
        )
    for mine, theirs in zip(own, saved, strict=True):
        for option in sorted(set(mine["options"]) | set(theirs["options"])):
            here, there = mine["options"].get(option), theirs["options"].get(option)
            if here != there:
                raise CheckpointError(
                    f"{folder} was saved with {mine['name']}({option}={there!r}), and "
                    f"{option}={here!r} was applied here. "
                    "surgery.apply(model, surgery.saved_passes(folder)) applies what was saved."
                )


def _check_shapes(saved: Mapping[str, Any], own: Mapping[str, Any], what: str) -> None:
    missing, extra = [n for n in saved if n not in own], [n for n in own if n not in saved]
    if missing or extra:
        raise CheckpointError(
            f"the save is of another {'model' if what == 'weight' else 'partition'}: "
            + (
                f"{len(missing)} of its {what}s are not here, {missing[0]} first; "
                if missing
                else ""
            )
            + (f"{len(extra)} {what}s are not in it, {extra[0]} first; " if extra else "")
            + "load the model that it was made from, and apply the same passes."
        )
    for name, shape in saved.items():
        if shape != own[name]:
            raise CheckpointError(
                f"{name} is {own[name][0]} {tuple(own[name][1:])} here, {shape[0]} "
                f"{tuple(shape[1:])} in the save. Load the model that it was made from."
            )


def _check_sums(saved: Mapping[str, str], own: Mapping[str, Tensor]) -> None:
    changed = [
        n for n, digest in saved.items() if encoding.checksum(shards.whole(own[n])) != digest
    ]
    if changed:
        raise CheckpointError(
            "the save holds no weights (weights=False), and the model does not have those that it "
            f"had then: {listed(changed)}. Load them first, from the checkpoint beside it."
        )
