"""Fixtures: Dynamo and the global generator start fresh for every test."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
import torch._dynamo
from torch._dynamo import guards
from torch._dynamo.guards import CheckFunctionManager

torch.set_num_threads(1)  # pytest-xdist has a worker on every core
# For its log, Dynamo flushes the cache and times the guards of each capture: 25 ms.
guards.profile_guard_manager = lambda *_: 0.0


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
    if next(ended) % 10 == 0:
        forget_guards()
        # torch's caches keep 10,000 objects of each capture: no collection needs to see them again.
        gc.collect()
        gc.freeze()


ended = itertools.count(1)  # tests


def forget_guards() -> None:
    """Drop guards of captures that are gone: what they guard keeps each alive, 4 MB."""
    for finalizer in list(weakref.finalize._registry):
        called = getattr((finalizer.peek() or (None, None))[1], "func", None)
        if isinstance(getattr(called, "__self__", None), CheckFunctionManager):
            finalizer.detach()
