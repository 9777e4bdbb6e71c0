"""Fixtures: the global generator starts fresh for every test; captures are shared between tests."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
import torch._dynamo
from torch._dynamo import guards

from surgery.engine.captures import CAPTURES, Capture

torch.set_num_threads(1)  # pytest-xdist has a worker on every core
# For its log, Dynamo flushes the cache and times the guards of each capture: 25 ms.
guards.profile_guard_manager = lambda *_: 0.0

KEPT = 40  # kinds of models whose captures outlive a test, 4 MB each: Dynamo is most of our time


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    yield
    for kind, capture in CAPTURES.items():
        kept.pop(kind, None)
        kept[kind] = capture
    while len(kept) > KEPT:
        kept.pop(next(iter(kept)))
    if next(ended) % 10 == 0:
        # torch's caches keep 10,000 objects of each capture: no collection needs to see them again.
        gc.collect()
        gc.freeze()


@pytest.fixture
def no_captures():
    """Nothing captured yet, as in a fresh process."""
    forget()
    yield
    forget()


def forget() -> None:
    kept.clear()
    CAPTURES.clear()
    torch._dynamo.reset()


kept: dict[object, Capture] = {}
ended = itertools.count(1)  # tests
