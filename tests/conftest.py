"""Fixtures: the global generator starts fresh for every test; captures are shared between tests."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import pytest
import torch
import torch._dynamo
from models import TRACED_WITH_A_MASK
from torch._dynamo import guards

from surgery.engine.captures import CAPTURES, Capture

torch.set_num_threads(1)  # pytest-xdist has a worker on every core
# For its log, Dynamo flushes the cache and times the guards of each capture: 25 ms.
guards.profile_guard_manager = lambda *_: 0.0

KEPT = 40  # kinds of models whose captures outlive a test, 4 MB each: Dynamo is most of our time


# What wants eager's very bits, or bytes counted out for its kernels.
WITHOUT_A_MASK = (
    "test_all_modules_active_is_adamw_to_the_bit",
    "test_bytes_of_a_block_to_the_byte",
    "test_law[lisa-llama-15",
    "test_law[misa-llama-15",
    "test_loss_gradients_and_bytes",
    "test_plan_predicts_what_report_measures[llama-misa]",
    "test_saved_bytes_are_those_of_the_formulas[llama]",
    "test_under_lora_whose_adapters_keep_copies_of_every_input[0.0]",
    "test_with_recompute_in_any_order",
)


def pytest_collection_modifyitems(items):
    if TRACED_WITH_A_MASK:
        reason = "this transformers gives attention a mask, and repeated keys, when it is traced"
        for item in items:
            if item.name.startswith(WITHOUT_A_MASK):
                item.add_marker(pytest.mark.skip(reason=reason))


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


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A folder with the first two layers of SmolLM2, model, and data: notes.txt, chats.jsonl."""
    from examples.real import HUB, sample, smollm2

    made = tmp_path_factory.mktemp("small")
    for part in smollm2(layers=2):
        part.save_pretrained(made / "model")
    (made / "notes.txt").write_text(sample("text", HUB)[0].read_text()[:9_000])
    chats = sample("chats", HUB)[0].read_text().splitlines()
    (made / "chats.jsonl").write_text("\n".join(chats[:8]))
    return made


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
