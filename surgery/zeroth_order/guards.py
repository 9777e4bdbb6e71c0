"""What a zeroth-order pass does not take, and what is said about it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from surgery.compat.tensors import leaves
from surgery.errors import ModelError, OptimizerError, listed


def check_given(name: str, arguments: Mapping[str, Any]) -> None:
    """Raise ModelError if what the model is given requires a gradient."""
    given = [
        argument
        for argument, value in arguments.items()
        if any(isinstance(t, Tensor) and t.requires_grad for t in leaves(value))
    ]
    if given:
        raise ModelError(
            f"{name}: {listed(given)} requires a gradient, but would get none: {name} trains by "
            f"forwards alone. Give it detached; or leave {name} out, to train what is in front of "
            "the model."
        )


def other_world(name: str, applied: int, now: int) -> ModelError:
    """Return the error for a number of ranks that has changed since `surgery.apply`."""
    return ModelError(
        f"{name}: per_rank=True was applied for {applied} ranks, but there are {now} now. Call "
        "torch.distributed.init_process_group before surgery.apply."
    )


def unheard(name: str) -> OptimizerError:
    """Return the error for a step before which no gradient has come."""
    return OptimizerError(
        f"{name}: no gradient has reached the coordinates since the last forward: the loss does "
        "not depend on the model's output, or backward was not called. Compute the loss from what "
        "model(...) returns, without detach() or item()."
    )


def warn_of_state(name: str, optimizer: Optimizer, scalars: Tensor, decays: bool) -> None:
    """Warn of what an optimizer does with scalars to no effect. decays: whether the pass does."""
    kind = type(optimizer).__name__
    groups = [g for g in optimizer.param_groups if any(p is scalars for p in g["params"])]
    given = [group["weight_decay"] for group in groups if group.get("weight_decay")]
    if given:
        example = f'surgery.apply(model, "{name}", weight_decay={given[0]})'
        none = f"{name} has none of its own: give"
        way = f"Give it to the pass, {example}, and" if decays else none
        warnings.warn(
            f"{name}: the weight_decay of {kind} acts on scalars that start from zero in each "
            f"step, so it has no effect. {way} weight_decay=0 to the optimizer.",
            stacklevel=2,
        )
    if any(group.get("momentum") or (group.get("betas") or (0.0,))[0] for group in groups):
        warnings.warn(
            f"{name}: {kind} has momentum, but the scalars that it steps stand for other "
            "directions after each step. Their state is dropped, so momentum has no effect and "
            "Adam takes the sign of each slope. Use torch.optim.SGD, or dense=True for momentum "
            "over weights.",
            stacklevel=2,
        )


def warn_of_silence(name: str, eps: float, steps: int) -> None:
    """Warn of slopes that have been zero for some steps."""
    warnings.warn(
        f"{name}: the two evaluations have returned exactly the same in {steps} steps running. "
        f"eps={eps} may be too small for the dtype of the model or of the loss (keep the loss in "
        "float32), or the loss is constant.",
        stacklevel=2,
    )
