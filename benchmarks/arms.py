"""Ways to train a language model: this library's and those that a user would pick instead.

A way takes a model, the learning rate of the matrices inside its blocks, that of all else (None:
frozen) and a seed, and returns the model and an optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import surgery
from surgery.weights.targets import blocks


def split(model: Any) -> tuple[list[str], list[str]]:
    """Return the matrices inside the blocks, and all other parameters, by name."""
    inside = {name for own in blocks(model).values() for name in own}
    names = {name: p.ndim == 2 and name in inside for name, p in model.named_parameters()}
    return [n for n, yes in names.items() if yes], [n for n, yes in names.items() if not yes]


def grouped(
    kind: Any,
    targets: Sequence[Tensor],
    others: Sequence[Tensor],
    lr: float,
    rest: float | None,
    **more: Any,
) -> Any:
    """Return an optimizer without decay of both groups."""
    groups = [{"params": list(targets), "lr": lr, **more}]
    for parameter in others:
        parameter.requires_grad_(rest is not None)
    if rest is not None and others:
        groups.append({"params": list(others), "lr": rest})
    return kind(groups, weight_decay=0.0)


def dense(model: Any, lr: float, rest: float | None, seed: int, kind: Any, **options: Any) -> Any:
    """Train the weights themselves with an optimizer. options: of the group of matrices."""
    targets, others = ([model.get_parameter(n) for n in names] for names in split(model))
    return model, grouped(kind, targets, others, lr, rest, **options)


def lora(
    model: Any,
    lr: float,
    rest: float | None,
    seed: int,
    *,
    rank: int,
    fixed: bool = False,
    merged: int | None = None,
    **options: Any,
) -> Any:
    """Train PEFT's adapters on all Linears of the blocks.

    fixed: A is drawn as rso draws P, and rests. merged: adapters are merged into the weights and
    begin anew every so many steps, without their optimizer state (as ReLoRA does, which restarts
    the learning rate, too).
    """
    torch.manual_seed(seed)
    others = [model.get_parameter(name) for name in split(model)[1]]
    options = {"target_modules": "all-linear", "lora_alpha": rank} | options
    model = get_peft_model(model, LoraConfig(r=rank, **options))
    for name, parameter in model.named_parameters():
        if fixed and "lora_A" in name:
            nn.init.normal_(parameter, std=rank**-0.5).requires_grad_(False)
    trained = [p for n, p in model.named_parameters() if "lora_" in n and p.requires_grad]
    optimizer = grouped(torch.optim.AdamW, trained, others, lr, rest)
    if merged:
        _merge_each(merged, model, optimizer)
    return model, optimizer


def _merge_each(period: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    layers: list[Any] = [each for each in model.modules() if isinstance(each, LoraLayer)]
    made = 0

    @torch.no_grad()
    def merge(*_: Any) -> None:
        nonlocal made
        made += 1
        if made % period:
            return
        for layer in layers:
            layer.get_base_layer().weight.add_(layer.get_delta_weight("default"))
            layer.reset_lora_parameters("default", True)
            for own in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                optimizer.state.pop(own, None)

    optimizer.register_step_post_hook(merge)


def ours(
    model: Any,
    lr: float,
    rest: float | None,
    seed: int,
    *,
    kind: Any,
    also: Sequence[Any] = (),
    **options: Any,
) -> Any:
    """Train by a pass. options: its own; all else is trained always if it has a learning rate."""
    targets, others = split(model)
    always = {"always": others} if rest is not None and takes(kind, "always") else {}
    surgery.apply(model, [kind(**always | {"seed": seed} | options), *also])
    wanted = set(targets)
    found = surgery.coordinates(model)
    small = [c.parameter for c in found if c.weight in wanted]
    whole = [c.parameter for c in found if c.weight not in wanted]
    if rest is None:
        return model, torch.optim.AdamW([*small, *whole], lr=lr, weight_decay=0.0)
    return model, grouped(torch.optim.AdamW, small, whole, lr, rest)


def takes(kind: Any, option: str) -> bool:
    """Whether a pass has an option."""
    return option in kind.__dataclass_fields__
