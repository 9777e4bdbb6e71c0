"""Saving a run and going on with it, to the bit: `surgery.save`, `surgery.load`.

A save holds the weights, the coordinates, what the passes have learned and counted, and the state
of the optimizer and the schedule, all by name. Projections, directions and masks are drawn from
seeds again. The state of torch's own generators (dropout) and of the data loader is the loop's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.catalogue import from_json
from surgery.checkpoints import encoding
from surgery.checkpoints import folder as saves
from surgery.checkpoints.contents import (
    about_of,
    check_whole,
    coordinates_of,
    extra_of,
    optimizer_state,
    scheduler_state,
    state_of,
    sums_of,
    tensors_of,
)
from surgery.checkpoints.fits import check, check_sums, check_ties, for_optimizer, for_scheduler
from surgery.checkpoints.ranks import on_first_rank
from surgery.compat.tensors import each as each_leaf
from surgery.engine.finding import applied
from surgery.engine.surgery import Surgery
from surgery.errors import CheckpointError, OptionError
from surgery.weights import shards
from surgery.weights.copies import accept


def save(
    model: nn.Module,
    folder: str | Path,
    optimizer: Any = None,
    scheduler: Any = None,
    weights: bool = True,
) -> None:
    """Write all that `surgery.load` needs to continue from here, after any optimizer step.

    An earlier save in the folder stays intact until the new one is complete. With several ranks,
    all must call it, and rank 0 writes.

    optimizer, scheduler: objects with a state_dict. weights: False leaves out the model's weights,
    if something else saves them; `load` then checks that the model has them. Raises ModelError if
    nothing was applied; CheckpointError if the save cannot be written, or if there are gradients
    that no step has used, since they are not saved.
    """
    surgery = applied(model)
    _check_given(optimizer=optimizer, scheduler=scheduler)
    if surgery.clock.stepping:
        raise CheckpointError(
            "an optimizer's step is under way: surgery.save was called from one of its hooks. Save "
            "after step() has returned."
        )
    if surgery.clock.stepped:
        raise CheckpointError(
            "some of the optimizers of this model have made their step, and others have not. Save "
            "between steps."
        )
    given = [c for c in surgery.decision.coordinates if c.parameter.grad is not None]
    if surgery.backward.pending and given:
        raise CheckpointError(
            f"{len(given)} coordinates have gradients, and no step has used them: a save would "
            "lose them. Save after optimizer.step(), at the end of an accumulation, or discard "
            "them first: optimizer.zero_grad()."
        )
    surgery.bind()
    tensors, state = tensors_of(surgery.decision.model), state_of(surgery)
    about = about_of(surgery, tensors)
    if weights:
        check_whole(model, surgery.decision.model, "save")
        state["weights"] = encoding.untied(tensors)
        state["extra state of modules"] = extra_of(surgery.decision.model)
    if optimizer is not None:
        state["optimizer"] = optimizer_state(surgery, optimizer)
    if scheduler is not None:
        state["scheduler"] = scheduler_state(surgery, scheduler)
    sums = {} if weights else sums_of(surgery, tensors)
    with on_first_rank() as first:
        whole = each_leaf(partial(shards.gathered, keep=first), state)  # on all ranks
        if first:
            saves.write(Path(folder), about | {"sums": sums}, whole)


@torch.inference_mode(False)  # the optimizer's state would never be stepped again
@torch.no_grad()
def load(
    model: nn.Module, folder: str | Path, optimizer: Any = None, scheduler: Any = None
) -> nn.Module:
    """Restore a model, its passes, an optimizer and a schedule from a save. Returns the same model.

    model: a model of the same architecture, with the same passes applied
    (`surgery.saved_passes(folder)`). optimizer: an optimizer of this model, built as it was for the
    run; False ignores its saved state. scheduler: likewise.

    An error changes nothing. Raises ModelError if nothing was applied; CheckpointError if the save
    is damaged, or of another format, architecture, partition or passes, or was made with an
    optimizer or a scheduler that is not given here.
    """
    surgery, folder = applied(model), Path(folder)
    _check_given(optimizer=optimizer, scheduler=scheduler)
    about, state = saves.read(folder)
    check(surgery, about, folder)
    weights = tensors_of(surgery.decision.model)
    check_sums(about["sums"], weights)
    if "weights" in state:
        check_ties(weights, state["weights"])
    for what, given in (("optimizer", optimizer), ("scheduler", scheduler)):
        if given is None and what in state:
            raise CheckpointError(
                f"{folder} holds the state of {_article(what)}, but none is given. Pass "
                f"{what}={what}, or {what}=False to ignore that state."
            )
        if given not in (None, False) and what not in state:
            raise CheckpointError(
                f"{folder} was saved without {_article(what)}. Pass {what}=None: yours then starts "
                "anew."
            )
    schedule: Any = None
    moments: Any = None
    if scheduler not in (None, False):
        schedule = for_scheduler(surgery, scheduler, state["scheduler"])
    if optimizer not in (None, False):
        moments = for_optimizer(surgery, optimizer, state["optimizer"])
    with ExitStack() as undo:  # what is others' may raise
        for name, extra in state.get("extra state of modules", {}).items():
            module = surgery.decision.model.get_submodule(name)
            before = deepcopy(module.get_extra_state())
            module.set_extra_state(extra)
            undo.callback(module.set_extra_state, before)
        if scheduler not in (None, False):
            before = deepcopy(scheduler.state_dict())
            scheduler.load_state_dict(schedule)
            undo.callback(scheduler.load_state_dict, before)
        if optimizer not in (None, False):
            optimizer.load_state_dict(moments)
        undo.pop_all()
    for name, tensor in state.get("weights", {}).items():
        shards.take(weights[name], tensor)
    restore(surgery, state)
    return model


def _check_given(**given: Any) -> None:
    for what, each in given.items():
        if each in (None, False) or hasattr(each, "state_dict"):
            continue
        kind = type(each).__name__
        if not isinstance(each, Sequence):
            raise OptionError(f"{what}= takes an object with a state_dict, but {kind} has none.")
        raise OptionError(
            f"{what}= takes one object with a state_dict, not a {kind}. Keep the state of several "
            "beside the save: torch.save([o.state_dict() for o in ...], "
            'folder / "others.pt").'
        )


def saved_passes(folder: str | Path) -> list[Any]:
    """Return the passes of a save, as `surgery.apply` takes them.

    Raises CheckpointError if there is no readable save, OptionError if this library does not know a
    pass or one of its options.
    """
    return [from_json(each) for each in saves.read_record(Path(folder))["passes"]]


@torch.no_grad()
def restore(surgery: Surgery, state: Mapping[str, Any]) -> None:
    """Take back what `state_of` returned; coordinates whole, or cut as they are here."""
    surgery.bind()
    counts = state["surgery"]
    surgery.clock.resume(counts["step"], counts["skipped"])
    for method, saved in zip(surgery.decision.methods, state["passes"], strict=True):
        method.restore(saved)
    # Of an optimizer whose state was not loaded; of a frozen weight it stays.
    surgery.clock.forget([c for c in surgery.decision.coordinates if not c.drawn])
    surgery.bind()  # other copies are trained now
    own = coordinates_of(surgery)
    frozen = {each.name for each in surgery.decision.coordinates if each.frozen}
    for name, tensor in state["coordinates"].items():
        if name in frozen and name not in own:  # here, and not where it was saved: no copy is held
            continue
        if tensor is not own[name]:
            shards.take(own[name], tensor)
    for site in surgery.decision.sites:
        for each in site.coordinates:
            rule = each.mapped or each.copied
            if rule is not None:
                rule.since = counts["since"][each.name]
            accept(site, each, surgery.clock.step)
            each.parameter.grad = each.norm = None


def _article(what: str) -> str:
    return "an optimizer" if what == "optimizer" else f"a {what}"
