"""Two processes under DistributedDataParallel: the step of one process on the joined batch."""

from __future__ import annotations

import pytest
import torch
from laws import run_two_ranks
from models import make
from torch.nn.parallel import DistributedDataParallel

import passes
import surgery

SCRIPT = """
    import sys; sys.path.insert(0, "tests")
    import torch
    from torch.nn.parallel import DistributedDataParallel
    from laws import PASSES, own, state_of
    from models import make, inputs_of, loss_of
    from ranks import assert_same, begin, count_sent
    import surgery

    rank = begin()

    def run(row, wrap):
        model = make("plain").double()
        surgery.apply(model, PASSES[row]())
        outer = DistributedDataParallel(model, find_unused_parameters=True) if wrap else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
        sent = count_sent(outer) if wrap else []
        drawn = []
        for seed in range(11):  # five rounds of two steps are drawn
            tokens = inputs_of("plain", rows=4, seed=seed)["tokens"]
            mine = tokens.chunk(2)[rank] if wrap else tokens
            loss_of(outer, {"tokens": mine}).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            drawn.append([c.active for c in surgery.coordinates(model)])
        assert state_of(model).clock.step == 11
        return {n: p.detach().clone() for n, p in own(model).items()}, drawn, sent

    start = dict(make("plain").double().named_parameters())
    for row in ROWS:
        both, drawn, sent = run(row, True)
        alone, expected, _ = run(row, False)
        assert drawn == expected, row
        for name in alone:
            if row == "compress":  # rounded at random, and otherwise in a smaller batch
                off, moved = both[name] - alone[name], alone[name] - start[name]
                assert off.norm() < 0.5 * moved.norm(), name
            else:
                torch.testing.assert_close(both[name], alone[name], rtol=1e-7, atol=1e-9, msg=row)
            assert_same(both[name], (row, name))
        dense = sum(p.numel() for p in alone.values())
        if row in ("rso", "velora", "galore"):  # only what stands for the weights travels
            assert sum(sent) / 11 < 0.6 * dense, (row, sum(sent) / 11, dense)
    print("equal")
"""


@pytest.mark.parametrize(
    "rows",
    [
        ["misa", "misa_always", "lisa", "badam"]
        + ["rso", "velora", "galore", "galore_renewed", "misa_and_both", "misa_of_rso", "compress"]
    ],
    ids=str,
)
def test_two_ranks_are_one_process_on_the_joined_batch(rows, tmp_path):
    run_two_ranks(SCRIPT.replace("ROWS", repr(rows)), tmp_path)


def test_a_wrap_that_would_wait_forever_is_refused(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = surgery.apply(make("plain"), passes.Misa(budget=0.2))
        tokens = torch.zeros(2, 6, dtype=torch.long)
        with pytest.raises(surgery.ModelError, match="find_unused_parameters=True"):
            DistributedDataParallel(model)(tokens, tokens)
        everything = surgery.apply(make("plain"), passes.Misa(budget=1.0))
        DistributedDataParallel(everything)(tokens, tokens).backward()
    finally:
        torch.distributed.destroy_process_group()
