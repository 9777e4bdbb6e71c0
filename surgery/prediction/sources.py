"""Models to plan for: there already, or from a config alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

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
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


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
        raise ModelError(
            f"{str(source)!r} is neither a model, nor a folder with a config.json, nor an id "
            f"that the hub answers to: {in_a_line(error, 200)}"
        ) from error


def batch_for(model: nn.Module, batch: Mapping[str, Any] | tuple[int, int]) -> Mapping[str, Any]:
    """Return a batch of tokens without memory for (rows, length), or what was given."""
    if isinstance(batch, Mapping):
        return batch
    try:
        rows, length = (int(each) for each in batch)
    except (TypeError, ValueError):
        rows = length = 0
    if rows < 1 or length < 1:
        raise OptionError(
            f"batch={batch!r} is neither keyword arguments of {type(model).__name__}'s forward nor "
            "(rows, length) of tokens, such as batch=(1, 2048)."
        )
    ids = torch.empty(rows, length, dtype=torch.long, device="meta")
    return {"input_ids": ids, "labels": ids}
