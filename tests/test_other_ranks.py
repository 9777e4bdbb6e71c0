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
from surgery.contract.registry import registered

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
            later = number % 2 and row != "sherl"  # which would not be sharded
            order = wrap if wrap == "DDP" else ("apply, shard", "shard, apply")[later]
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
    ours = {name for name, kind in registered().items() if kind.__module__.startswith("passes.")}
    ours -= {"flat_lora", "trim"}  # of PEFT's models; of tables, which FSDP2 may not cut
    assert surgery.available() and used == ours
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


HELD = """
    import sys; sys.path.insert(0, "tests")
    from contextlib import nullcontext
    import torch
    from laws import state_of
    from models import inputs_of, loss_of
    from ranks import assert_same, begin, start, whole_weights
    import surgery

    rank = begin()

    def go(row, order):
        model, optimizer = start(row, order)
        torch.manual_seed(rank)  # of no effect
        for step in range(6):
            bad = float("nan") if step == 2 and (rank or not order) else 1.0
            for part in range(2):
                last = part == 1
                if order and order != "DDP":
                    model.set_requires_gradient_sync(last)
                with model.no_sync() if order == "DDP" and not last else nullcontext():
                    inputs = inputs_of("plain", rows=4, seed=2 * step + part)
                    if order:
                        inputs = {k: v.chunk(2)[rank] for k, v in inputs.items()}
                    (bad * loss_of(model, inputs) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        clock = state_of(model).clock
        assert (clock.step, clock.skipped) == (5, 1), (row, order)
        return whole_weights(model)

    for row in ("misa", "rso", "velora", "galore_svd", "mezo"):
        alone = go(row, None)
        for order in ("DDP", "apply, shard"):
            for name, value in go(row, order).items():
                assert_same(value, (row, order, name))
                said = f"{row} {order} {name}"
                torch.testing.assert_close(value, alone[name], rtol=1e-7, atol=1e-9, msg=said)
    print("equal")
"""


def test_what_one_rank_meets_holds_for_both(tmp_path):
    """Two micro-batches a step, sent with the last; in one step, NaN on one of the ranks."""
    run_two_ranks(HELD, tmp_path)
