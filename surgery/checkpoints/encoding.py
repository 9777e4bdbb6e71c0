"""Values and tensors nested, as JSON beside a flat dict of tensors, and digests of tensors."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from surgery.errors import CheckpointError


def untied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out what is tied to one that comes before."""
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    return {name: tensors[name] for name in first.values()}


def encode(
    value: Any, place: str, tensors: dict[str, Tensor], held: dict[int, str] | None = None
) -> Any:
    """Return a value as JSON; its tensors go into a dict, under the place where they stood.

    held: the place of each storage in the dict, where no two tensors share one.
    """
    held = {} if held is None else held
    if isinstance(value, Tensor):
        return {"tensor": _placed(value.detach(), place, tensors, held)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        found = [encode(each, f"{place}/{i}", tensors, held) for i, each in enumerate(value)]
        return found if isinstance(value, list) else {"tuple": found}
    if isinstance(value, Mapping):
        made = [[k, encode(v, f"{place}/{k}", tensors, held)] for k, v in value.items()]
        if all(isinstance(k, str) for k in value):
            return {"dict": dict(made)}
        return {"counter" if isinstance(value, Counter) else "items": made}
    raise CheckpointError(
        f"{place.lstrip('/')} is a {type(value).__name__}, which a checkpoint cannot hold without "
        "pickling. Use tensors, numbers, strings, and lists and dicts of these."
    )


def _placed(tensor: Tensor, place: str, tensors: dict[str, Tensor], held: dict[int, str]) -> str:
    storage = tensor.untyped_storage().data_ptr()
    other = held.setdefault(storage, place) if tensor.numel() else place
    if other != place:
        if tensors[other].is_set_to(tensor):  # bitsandbytes has one table for all weights
            return other
        tensor = tensor.clone()
    tensors[place] = tensor.contiguous()
    return place


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Turn what `encode` made into what it was."""
    if isinstance(value, list):
        return [decode(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(decode(each, tensors) for each in content)
    if kind == "dict":
        return {key: decode(each, tensors) for key, each in content.items()}
    pairs: Iterable[Any] = ((key, decode(each, tensors)) for key, each in content)
    return Counter(dict(pairs)) if kind == "counter" else dict(pairs)


def checksum(tensor: Tensor) -> str:
    """Return a short digest of a tensor's bytes."""
    flat = rearrange(tensor.detach().cpu().contiguous(), "... -> (...)").view(torch.uint8)
    numbers: Any = flat.numpy()
    return hashlib.blake2b(numbers, digest_size=8).hexdigest()
