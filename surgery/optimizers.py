"""What the clock finds out about an optimizer at its first step."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer

from surgery import sharding
from surgery.coordinates import Piece, unique
from surgery.errors import OptimizerError, listed


def check_membership(
    pieces: Sequence[Piece], optimizer: Optimizer, held: Mapping[int, Tensor]
) -> None:
    """Raise OptimizerError if a coordinate is held by no optimizer."""
    missing = {id(p.parameter): p.name for p in pieces if id(p.parameter) not in held}
    if not missing:
        return
    # Only here, once, on the way to an error: another optimizer may hold the rest.
    others = [o for o in gc.get_objects() if issubclass(type(o), Optimizer)]
    for other in others:
        for group in other.param_groups:
            for parameter in group["params"]:
                missing.pop(id(parameter), None)
    if missing:
        raise OptimizerError(
            f"{type(optimizer).__name__} steps this model but holds none of "
            f"{len(missing)} coordinates, which no other optimizer holds either: "
            f"{listed(missing.values())}. It was probably built before surgery.apply, or from "
            "a part of the parameters (get_peft_model after surgery.apply switches "
            "requires_grad off). Build it afterwards, from all: "
            "optimizer = torch.optim.AdamW(model.parameters(), lr=...)"
        )


def check_fresh(pieces: Sequence[Piece], optimizer: Optimizer) -> None:
    """Raise OptimizerError if an optimizer has made steps before the surgery's first."""
    stepped = [p for p in unique(pieces) if optimizer.state.get(p.parameter)]
    if not stepped:
        return
    made = optimizer.state[stepped[0].parameter].get("step")
    count = "steps" if made is None else f"{int(made)} steps"
    raise OptimizerError(
        f"{type(optimizer).__name__} has made {count} already, with state for "
        f"{stepped[0].name}, and the surgery none. If a run is resumed, give the surgery its "
        "state too: surgery.load(model, folder, optimizer), or surgery.TrainerCallback() in a "
        "Trainer. If not, build the optimizer after surgery.apply."
    )


def only_makes_state(optimizer: Optimizer) -> bool:
    """Whether a step has rate zero and gradients of zeros: torch.distributed.checkpoint makes the
    state of an optimizer so, to load into."""
    if any(group.get("lr", 1.0) for group in optimizer.param_groups):
        return False
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    there = [sharding.local(grad) for grad in grads if grad is not None]
    return bool(there) and not any(bool(grad.any()) for grad in there)
