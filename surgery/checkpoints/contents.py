"""What a save holds of a run: its weights, coordinates, counts and optimizer, each by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn

from surgery.checkpoints import encoding
from surgery.compat.fsdp import own_class
from surgery.contract.options import to_json
from surgery.engine.surgery import Surgery
from surgery.errors import CheckpointError, listed
from surgery.weights import shards
from surgery.weights.coordinate import Coordinate, unique
from surgery.weights.table import TABLE


def about_of(surgery: Surgery, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Return what a save is of: passes, and shapes of weights and coordinates."""
    tensors = tensors_of(surgery.decision.model) if tensors is None else tensors
    return {
        "library": version("model-surgery"),
        "model": own_class(surgery.decision.model).__name__,
        "passes": [to_json(options) for options in surgery.decision.passes],
        "weights": _shapes(tensors),
        "coordinates": _shapes({c.name: c.parameter for c in _listed(surgery)}),
    }


def state_of(surgery: Surgery) -> dict[str, Any]:
    """Return what a run needs to go on, besides weights and optimizers."""
    return {
        "surgery": {
            "step": surgery.clock.step,
            "skipped": surgery.clock.skipped,
            "since": {
                c.name: rule.since
                for c in surgery.decision.coordinates
                if (rule := c.mapped or c.copied) is not None
            },
        },
        "passes": [method.state() for method in surgery.decision.methods],
        "coordinates": coordinates_of(surgery),
    }


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint of the model holds, by name: parameters and persistent buffers."""
    kept = set(model.state_dict(keep_vars=True))
    both = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: tensor for name, tensor in both if name in kept and TABLE not in name.split(".")}


def check_whole(model: nn.Module, inner: nn.Module, what: str) -> None:
    """Raise CheckpointError if a model holds weights outside of the part that would be written."""
    own = {id(p) for p in inner.parameters()}
    outside = [name for name, p in model.named_parameters() if id(p) not in own]
    if outside:
        kind = type(inner).__name__
        raise CheckpointError(
            f"surgery was applied to the {kind} inside of this {type(model).__name__}, so "
            f"{listed(outside)} would not be written. Save these yourself (model.state_dict()) and "
            f"give surgery.{what} the {kind}, or apply surgery to the whole model."
        )


def extra_of(model: nn.Module) -> dict[str, Any]:
    """Return the extra state of modules that have some (torch's `get_extra_state`), by name."""
    plain = nn.Module.get_extra_state
    own = [(n, m) for n, m in model.named_modules() if type(m).get_extra_state is not plain]
    return {name: module.get_extra_state() for name, module in own}


def coordinates_of(surgery: Surgery) -> dict[str, Tensor]:
    """Return the mapped coordinates and the copies that are trained now, by name."""
    return {c.name: c.parameter for c in _listed(surgery) if c.mapped or c.active}


def _listed(surgery: Surgery) -> list[Coordinate]:
    """Return the coordinates that are no weights."""
    return [c for c in unique(surgery.decision.coordinates) if c.mapped or c.copied]


def sums_of(surgery: Surgery, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return checksums of the weights that are trained."""
    # By identity: PEFT renames the weights that it wraps after surgery was applied.
    sites = {id(site.current()) for site in surgery.decision.sites}
    trained = sites or {id(tensor) for tensor in tensors.values() if tensor.requires_grad}
    once = {n: shards.whole(t) for n, t in encoding.untied(tensors).items() if id(t) in trained}
    return {name: encoding.checksum(tensor) for name, tensor in once.items()}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    return {name: [kinds[name], *tensor.shape] for name, tensor in tensors.items()}


def optimizer_state(surgery: Surgery, optimizer: Any) -> dict[str, Any]:
    """Return an optimizer's state by the names of what it steps."""
    found, own = optimizer.state_dict(), names_in(surgery, optimizer)
    groups = [
        {key: value for key, value in group.items() if key != "params"} | {"params": names}
        for group, names in zip(found["param_groups"], own, strict=True)
    ]
    at = places(found, own)
    states = {at[index]: state for index, state in found["state"].items() if state}
    return {"kind": kind_of(optimizer), "groups": groups, "states": states}


def scheduler_state(surgery: Surgery, scheduler: Any) -> dict[str, Any]:
    """Return a schedule's state, its kind, and the names of what is in each group of its optimizer;
    None for these if it has none."""
    plain = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps one
    optimizer = getattr(plain, "optimizer", None)
    return {
        "kind": type(plain).__name__,
        "groups": None if optimizer is None else names_in(surgery, optimizer),
        "state": dict(scheduler.state_dict()),
    }


def names_in(surgery: Surgery, optimizer: Any) -> list[list[str]]:
    """Return the names of the parameters in each group of an optimizer."""
    known = {id(p): name for name, p in known_parameters(surgery).items()}
    strangers = sum(id(p) not in known for g in optimizer.param_groups for p in g["params"])
    if strangers:
        raise CheckpointError(
            f"{kind_of(optimizer)} holds {strangers} parameters that are not the model's, so their "
            "state has no name. Make them part of the model, or give them their own optimizer."
        )
    return [[known[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def known_parameters(surgery: Surgery) -> dict[str, nn.Parameter]:
    return dict(surgery.decision.model.named_parameters())


def places(found: Mapping[str, Any], names: Iterable[Iterable[str]]) -> dict[Any, str]:
    """Return the name at each index of an optimizer's state_dict."""
    return {
        index: name
        for group, own in zip(found["param_groups"], names, strict=True)
        for index, name in zip(group["params"], own, strict=True)
    }


def kind_of(optimizer: Any) -> str:
    return type(getattr(optimizer, "optimizer", optimizer)).__name__  # accelerate's wraps one
