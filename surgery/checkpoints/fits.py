"""Whether a save fits a model, its passes and an optimizer: an error that says what differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor

from surgery.checkpoints import encoding
from surgery.checkpoints.contents import (
    about_of,
    kind_of,
    known_parameters,
    names_in,
    places,
    scheduler_state,
)
from surgery.contract.options import by_new_names, to_json
from surgery.engine.surgery import Surgery
from surgery.errors import CheckpointError, listed
from surgery.weights import shards


def check_ties(own: Mapping[str, Tensor], saved: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the same weights are tied here as in the save."""
    here = encoding.untied(own)
    tied, apart = [n for n in own if n in saved and n not in here], set(here) - set(saved)
    if apart:
        raise CheckpointError(
            f"{listed(sorted(apart))} was tied to another weight in the save, which therefore has "
            "no value of its own for it, but is not tied here. Tie it as it was: "
            "model.tie_weights() with config.tie_word_embeddings=True."
        )
    if tied:
        raise CheckpointError(
            f"{listed(tied)} is tied to another weight here, but has a value of its own in the "
            "save: one of the two would be lost. Build the model as it was: "
            "config.tie_word_embeddings=False."
        )


def for_optimizer(surgery: Surgery, optimizer: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the saved state as this optimizer's load_state_dict takes it. Raises."""
    if saved["kind"] != kind_of(optimizer):
        raise CheckpointError(
            f"the save was made with {saved['kind']}, but {kind_of(optimizer)} is given. Build the "
            "optimizer as it was, or pass optimizer=False."
        )
    found, own = optimizer.state_dict(), names_in(surgery, optimizer)
    known = known_parameters(surgery)
    by_names = {frozenset(group["params"]): group for group in saved["groups"]}
    groups = []
    for group, names in zip(found["param_groups"], own, strict=True):
        same = by_names.get(frozenset(names))
        if same is None or len(found["param_groups"]) != len(saved["groups"]):
            first = next((n for n in names if not any(n in each for each in by_names)), "")
            raise CheckpointError(
                f"the parameter groups of {kind_of(optimizer)} are not those of the save"
                + (f", which has no state for {first}" if first else "")
                + ". Build the groups from the same parameters as before."
            )
        groups.append({**group, **same, "params": group["params"]})
    states = {
        i: {key: _cut_like(value, known[n]) for key, value in saved["states"][n].items()}
        for i, n in places(found, own).items()
        if n in saved["states"]
    }
    return {**found, "param_groups": groups, "state": states}


# Entries of a schedule's state with one value for each group of the optimizer.
_BY_GROUP = {"base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "base_momentums", "max_momentums"}


def for_scheduler(surgery: Surgery, scheduler: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the saved state as this schedule's load_state_dict takes it. Raises."""
    present = scheduler_state(surgery, scheduler)
    if saved["kind"] != present["kind"]:
        raise CheckpointError(
            f"the save was made with {saved['kind']}, but {present['kind']} is given. "
            "Build the schedule as it was, or pass scheduler=False."
        )
    if _inside(saved["state"]) != _inside(present["state"]):
        raise CheckpointError(
            f"the save was made with other schedules inside of {saved['kind']} than those that are "
            "given. Build the schedule as it was, or pass scheduler=False."
        )
    state, there, own = deepcopy(saved["state"]), saved["groups"], present["groups"]
    if there is None or own is None or own == there:
        return state
    known = {frozenset(names): index for index, names in enumerate(there)}
    if len(own) != len(there) or any(frozenset(names) not in known for names in own):
        raise CheckpointError(
            f"the parameter groups of the {saved['kind']} are not those of the save. Build "
            "the optimizer from the same groups as before; their order does not matter."
        )
    return _turned(state, [known[frozenset(names)] for names in own])


def _inside(state: Any) -> list[Any]:
    """Return the names of what each schedule inside of another keeps, which differ by kind."""
    lists = [v for v in state.values() if isinstance(v, list)] if isinstance(state, dict) else []
    parts = [each for found in lists for each in found if isinstance(each, dict)]
    return [(sorted(each), _inside(each)) for each in parts]


def _turned(state: Any, order: Sequence[int]) -> Any:
    """Put what a schedule holds by group into another order, of schedules inside of it too."""
    if isinstance(state, list):
        return [_turned(each, order) for each in state]
    if not isinstance(state, dict):
        return state
    return {
        key: [value[i] for i in order]
        if key in _BY_GROUP and isinstance(value, list) and len(value) == len(order)
        else _turned(value, order)
        for key, value in state.items()
    }


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
    names, others = ([each["name"] for each in passes] for passes in (own, saved))
    if names != others:
        raise CheckpointError(
            f"{folder} was saved with {listed(others)}, but {listed(names)} was applied here. "
            "surgery.apply(model, surgery.saved_passes(folder)) applies what was saved."
        )
    for options, mine, theirs in zip(surgery.decision.passes, own, saved, strict=True):
        held = by_new_names(type(options), theirs["options"])
        for option in sorted(set(mine["options"]) | set(held)):
            here, there = mine["options"].get(option), held.get(option)
            if here != there:
                raise CheckpointError(
                    f"{folder} was saved with {mine['name']}({option}={there!r}), but "
                    f"{option}={here!r} was applied here. "
                    "surgery.apply(model, surgery.saved_passes(folder)) applies what was saved."
                )


def _check_shapes(saved: Mapping[str, Any], own: Mapping[str, Any], what: str) -> None:
    missing, extra = [n for n in saved if n not in own], [n for n in own if n not in saved]
    if missing or extra:
        raise CheckpointError(
            f"the save is of another {'model' if what == 'weight' else 'partition'}: "
            + (
                f"{len(missing)} of its {what}s are not in this model, such as {missing[0]}; "
                if missing
                else ""
            )
            + (f"{len(extra)} {what}s are not in the save, such as {extra[0]}; " if extra else "")
            + "load the model that it was made from, and apply the same passes."
        )
    for name, shape in saved.items():
        if shape != own[name]:
            raise CheckpointError(
                f"{name} is {own[name][0]} {tuple(own[name][1:])} here, but {shape[0]} "
                f"{tuple(shape[1:])} in the save. Load the model that it was made from."
            )


def check_sums(saved: Mapping[str, str], own: Mapping[str, Tensor]) -> None:
    changed = [
        n for n, digest in saved.items() if encoding.checksum(shards.whole(own[n])) != digest
    ]
    if changed:
        raise CheckpointError(
            "the save holds no weights (weights=False), and the model has others than it had then: "
            f"{listed(changed)}. Load them first, from the checkpoint beside the save."
        )
