"""Fixtures: Dynamo and the global generator start fresh for every test."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch._dynamo
from torch._dynamo.guards import CheckFunctionManager

torch.set_num_threads(1)  # pytest-xdist has a worker on every core


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
    forget_guards()
    # torch's caches keep 10,000 objects of each capture: no collection needs to look at them again.
    gc.collect()
    gc.freeze()


def forget_guards() -> None:
    """Drop guards of captures that are gone: what they guard keeps each alive, 4 MB."""
    for finalizer in list(weakref.finalize._registry):
        called = getattr((finalizer.peek() or (None, None))[1], "func", None)
        if isinstance(getattr(called, "__self__", None), CheckFunctionManager):
            finalizer.detach()
