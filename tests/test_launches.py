"""Launch counts: what a step would launch on an accelerator, whatever the size of a weight."""

from __future__ import annotations

from functools import lru_cache

import pytest
from models import TRACED_WITH_A_MASK

from benchmarks.launches import Launches, forward, step, weights

step = lru_cache(step)
EXACT = ["misa + recompute + chunked_loss"]

pytestmark = pytest.mark.filterwarnings("ignore")  # what Dynamo and SGD over scalars announce


def count(row: str) -> Launches:
    found = step(row, layers=1)
    assert found.waits <= 2, f"{row} waits for the device {found.waits} times"
    return found


@pytest.mark.parametrize("row", EXACT)
def test_exact_passes_and_samplers_launch_no_more_than_eager(row):
    assert count(row).count <= 1.1 * count("eager").count


@pytest.mark.parametrize("row", ["rso"])
def test_projections_launch_twelve_a_weight_more(row):
    assert count(row).count <= count("eager").count + 12 * weights(layers=1)


# Of the vectors and the head there are more beside one block than beside four: one a weight more.
@pytest.mark.parametrize("row", ["mezo", "lozo"])
def test_zeroth_order_launches_two_forwards_and_eight_a_weight(row):
    masks = 12 if TRACED_WITH_A_MASK else 0
    assert count(row).count <= 2 * (forward(layers=1) + masks) + 9 * weights(layers=1)


def test_compress_launches_four_for_each_packed_tensor():
    found, eager = count("compress"), count("eager")
    packed = found.names["compiled"] / 2  # packed in forward, unpacked in backward
    assert packed >= 11 and found.count <= eager.count + 4 * packed


@pytest.mark.parametrize("row", ["mezo"])
def test_counts_do_not_depend_on_the_size_of_weights(row):
    assert step(row, hidden=512, layers=1).names == count(row).names
