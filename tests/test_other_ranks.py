"""Every pass goes on with another number of ranks: one saves, two go on and save, one goes on.

The reference is the run of one process that was never interrupted. Two ranks add up the gradients
of the halves of a batch, in another order: in float64, equal up to 1e-7.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from laws import run_two_ranks
from models import make
from ranks import SHARDED, start, steps, whole_weights
from torch import Tensor

import surgery
from surgery.catalogue import resolve

ROWS = [row for row in SHARDED if row not in ("all", "misa of bfloat16")]
FIRST, SECOND, THIRD = range(3), range(3, 5), range(5, 8)
WRAPS = ("DDP", "FSDP2")

TWO = """
    import sys; sys.path.insert(0, "tests")
    from pathlib import Path
    from ranks import assert_same, begin, start, steps, whole_weights
    from test_other_ranks import ROWS, SECOND, THIRD, WRAPS, check
    import surgery

    rank, folder, kept = begin(), Path(FOLDER), []
    for number, row in enumerate(ROWS):
        for wrap in WRAPS:
            order = wrap if wrap == "DDP" else ("apply, shard", "shard, apply")[number % 2]
            model, optimizer = start(row, order, seed=5)
            surgery.load(model, folder / row, optimizer)
            steps(model, optimizer, SECOND, rank)
            surgery.save(model, folder / f"{row}, {wrap}", optimizer)
            steps(model, optimizer, THIRD, rank)
            found = whole_weights(model)
            check(row, found, folder)
            for name, value in found.items():
                assert_same(value, (row, wrap, name))
            kept.append(model)  # what is traced is shared with those that live
    print("equal")
"""


def check(row: str, found: Mapping[str, Tensor], folder: Path) -> None:
    """Hold weights against those of the run that was not interrupted."""
    begun = dict(make("plain").double().named_parameters())
    for name, value in torch.load(folder / f"{row}.pt", weights_only=True).items():
        if row == "compress":  # rounded at random, and otherwise in a smaller batch
            off, moved = found[name] - value, value - begun[name]
            assert off.norm() < 0.5 * moved.norm(), name
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9, msg=row + name)


def test_every_pass_goes_on_on_two_ranks_and_back_on_one(tmp_path):
    used = {each.name for row in ROWS for each in resolve(SHARDED[row](), {})}
    assert used == set(surgery.available())
    runs = {row: start(row, None) for row in ROWS}
    for row, (model, optimizer) in runs.items():
        steps(model, optimizer, FIRST, None)
        surgery.save(model, tmp_path / row, optimizer)
        steps(model, optimizer, [*SECOND, *THIRD], None)
        torch.save(whole_weights(model), tmp_path / f"{row}.pt")
    run_two_ranks(TWO.replace("FOLDER", repr(str(tmp_path))), tmp_path)
    for row, (model, optimizer) in runs.items():
        for wrap in WRAPS:
            surgery.load(model, tmp_path / f"{row}, {wrap}", optimizer)
            steps(model, optimizer, THIRD, None)
            check(row, whole_weights(model), tmp_path)
