"""Weights of Linears: the candidates of passes that keep a projection of the input."""

from __future__ import annotations

import torch
from torch import nn

from surgery.compat.tensors import is_wrapper
from surgery.errors import TargetError
from surgery.weights import shards
from surgery.weights.modules import in_features, is_linear_module, is_stacked
from surgery.weights.targets import Targets, blocks, select


def linears(model: nn.Module, targets: Targets, what: str, stacked: bool = False) -> list[str]:
    """Return the trainable weights of Linears among the targets (default: of all blocks).

    stacked: whether to include the weights of stacked experts. what: the name of the pass, for
    errors. Raises TargetError if a target is tied, quantised, or does not belong to a Linear.
    """
    if targets is None:
        inside = {name for own in blocks(model).values() for name in own}
        names = [name for name, _ in model.named_parameters() if name in inside]
        names = [name for name in names if _is_weight(model, name, stacked)]
    else:
        names = select(model, targets, "targets")
        names = [name for name in names if not name.endswith("bias")]
        _check(model, names, what, stacked)
    return [name for name in names if model.get_parameter(name).requires_grad]


def _is_weight(model: nn.Module, name: str, stacked: bool) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    if stacked and is_stacked(owner, model.get_parameter(name)):
        return True
    return is_linear_module(owner) and name.endswith("weight")


def inputs_of(model: nn.Module, name: str) -> int:
    """Return the width of the input that the weight of this name multiplies."""
    return in_features(model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name))


def _check(model: nn.Module, names: list[str], what: str, stacked: bool) -> None:
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name in names:
        weight = model.get_parameter(name)
        if owners[id(weight)] > 1:
            raise TargetError(
                f"{what}: {name} is tied to another weight, whose gradient would be lost. Leave it "
                "out of targets=, or train it densely with always=[...]."
            )
        check_steps(name, weight, what)
        if not _is_weight(model, name, stacked):
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
            raise TargetError(
                f"{what}: {name} belongs to {owner}, and only inputs of Linears can be projected. "
                "Leave it out of targets=, or train it densely with always=[...]."
            )


def check_steps(name: str, weight: nn.Parameter, what: str) -> None:
    """Raise TargetError if a weight is of a kind that cannot take steps: quantised, float8."""
    foreign = is_wrapper(weight) and not shards.is_cut(weight)
    if not weight.is_floating_point() or foreign:
        raise TargetError(
            f"{what}: {name} is quantised ({type(weight).__name__}, {weight.dtype}), so it cannot "
            "be trained. Add adapters, peft.get_peft_model(model, LoraConfig(...)), and target "
            "those."
        )
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TargetError(
            f"{what}: {name} is {weight.dtype}, which cannot be trained. Convert it to "
            "bfloat16, or train adapters on top of it."
        )
