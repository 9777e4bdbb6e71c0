"""Models to plan for: there already, or from a config alone."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from surgery.errors import ModelError, OptionError, extra, in_a_line

Source: TypeAlias = "nn.Module | str | os.PathLike[str] | Any"  # Any: a PretrainedConfig


def model_of(source: Source) -> nn.Module:
    """Return a model without weights, unless it is one already.

    source: a module; a config of transformers, a folder with a config.json, or an id of the hub,
    for a causal language model in training mode and the config's dtype.
    """
    if not isinstance(source, str | os.PathLike) and not hasattr(source, "model_type"):
        return source
    if isinstance(source, nn.Module):
        return source
    config = config_of(source)
    from transformers import AutoModelForCausalLM

    dtype = getattr(config, "dtype", None)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    except ValueError as error:
        raise ModelError(
            f"a {type(config).__name__} is not the config of a causal language model, which is "
            'what a config alone stands for. Make the model: with torch.device("meta"): model = '
            "AutoModelForImageClassification.from_config(config), or its like, and give that and "
            f"a batch. transformers says: {in_a_line(error, 120)} ..."
        ) from error


def config_of(source: str | os.PathLike[str] | Any) -> Any:
    """Return the config of a folder, of a file of one, or of an id of the hub; a config itself.

    Raises ModelError if there is none, or one that transformers cannot read.
    """
    if not isinstance(source, str | os.PathLike):
        return source
    try:
        from transformers import AutoConfig
    except ModuleNotFoundError as error:
        raise extra("hf", "configs of Hugging Face models are read by transformers") from error
    path = Path(source)
    try:
        return AutoConfig.from_pretrained(path if path.exists() else str(source))
    except (OSError, ValueError) as error:
        reason = in_a_line(error, 200)
        if "connect" in str(error):
            reason = "the hub was not reached, and the cache of this machine does not have it"
        raise ModelError(
            f"{str(source)!r} is neither a model, nor a folder with a config.json, nor the id of "
            f"a model on the hub: {reason}"
        ) from error


def batch_for(
    model: nn.Module, batch: Mapping[str, Any] | tuple[int, int], loss: object = None
) -> Mapping[str, Any]:
    """Return a batch of tokens without memory for (rows, length), or what was given.

    Raises OptionError for what is neither, or without the labels that a model makes its loss of,
    if no other loss is given.
    """
    if isinstance(batch, Mapping):
        if loss is None and batch.get("labels") is None and _takes_labels(model):
            raise OptionError(
                f"the batch has no labels, so {type(model).__name__} computes no loss. Add them "
                'as batch["labels"], or give the loss of your loop: loss=lambda model, batch: ...'
            )
        return batch
    try:
        rows, length = (int(each) for each in batch)
    except (TypeError, ValueError, RuntimeError):
        rows = length = 0
    if rows < 1 or length < 1:
        given = repr(batch) if type(batch) is tuple else f"a {type(batch).__name__}"
        raise OptionError(
            f"batch={in_a_line(given, 60)} is neither keyword arguments of "
            f"{type(model).__name__}'s forward nor (rows, length) of tokens, such as "
            "batch=(1, 2048)."
        )
    ids = torch.empty(rows, length, dtype=torch.long, device="meta")
    return {"input_ids": ids, "labels": ids}


def shape_of(batch: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return rows and length of a batch, None if no tensor of it has both and no more."""
    ids = next((v for v in batch.values() if isinstance(v, Tensor) and v.ndim == 2), None)
    return None if ids is None else (ids.shape[0], ids.shape[1])


def is_adapted(model: nn.Module) -> bool:
    """Whether some of a model is frozen, as get_peft_model leaves it."""
    return not all(parameter.requires_grad for parameter in model.parameters())


def adapted(model: nn.Module, there: bool) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a model without weights with LoRA on every Linear, and the lines that put it on.

    there: whether it is the user's own, which is not changed: OptionError.
    """
    line = "model = get_peft_model(model, LoraConfig(r=16, target_modules='all-linear'))"
    if there:
        raise OptionError(
            f"nothing of this {type(model).__name__} is frozen, so there are no adapters to plan "
            f"for. Add them first, with peft: {line}"
        )
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("adapters need peft: pip install peft") from error
    made: Any = model
    with torch.device("meta"):
        made = get_peft_model(made, LoraConfig(r=16, target_modules="all-linear"))
    return made.train(), ("from peft import LoraConfig, get_peft_model", line)


def _takes_labels(model: Any) -> bool:
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "labels" in inspect.signature(own.forward).parameters
