"""Fixtures: Dynamo and the global generator start fresh for every test."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo

torch.set_num_threads(1)  # pytest-xdist has a worker on every core


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
