"""Law 9 beyond test_laws.py: schedules and groups, transformers, fresh processes, 16 bits."""

from __future__ import annotations

from pathlib import Path

import processes
import pytest
import torch
from laws import PASSES, own, state_of
from models import inputs_of, loss_of, make

import surgery

pytestmark = pytest.mark.filterwarnings("ignore:.*scalars that")
SAVED, STEPS = 3, 20  # in the middle of a round of 2, resp. 3 steps


def optimizer_of(model):
    """AdamW in two groups, and a schedule, as a user has them."""
    first, second = [p for p in model.parameters() if p.requires_grad], []
    while len(second) < len(first) // 2:
        second.append(first.pop())
    groups = [{"params": first}, {"params": second, "weight_decay": 0.0, "lr": 3e-3}]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)


def advance(model, optimizer, scheduler, family: str, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)  # dropout, where the family has it
        loss_of(model, inputs_of(family, seed=step)).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def begin(row: str, family: str, seed: int):
    model = make(family, seed)
    surgery.apply(model, PASSES[row](period=2))
    return model, *optimizer_of(model)


def resumed(row: str, family: str, folder: Path):
    run = begin(row, family, seed=5)  # of other weights
    surgery.load(run[0], folder, *run[1:])
    return run


@pytest.mark.parametrize(
    ("row", "family"),
    [("misa_flush", "plain"), ("rso_and_all", "plain"), ("sparse_mezo", "plain")]
    + [("misa", "gpt2"), ("compress", "gpt2"), ("rso", "mixtral")],
)
def test_9_a_resumed_run_is_the_uninterrupted_one(row, family, tmp_path):
    run = begin(row, family, seed=0)
    advance(*run, family, range(SAVED))
    surgery.save(run[0], tmp_path, *run[1:])
    other = resumed(row, family, tmp_path)
    for each in (run, other):
        advance(*each, family, range(SAVED, SAVED + STEPS))
    for name, parameter in own(run[0]).items():
        assert torch.equal(parameter, own(other[0])[name]), name
    assert state_of(run[0]).clock.step == state_of(other[0]).clock.step == SAVED + STEPS
    active = [[c.active for c in surgery.coordinates(r[0])] for r in (run, other)]
    assert active[0] == active[1]


FRESH = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from laws import own
from test_resume import SAVED, STEPS, advance, resumed
for row in sys.argv[2:]:
    folder = Path(sys.argv[1]) / row
    run = resumed(row, "plain", folder)
    advance(*run, "plain", range(SAVED, SAVED + STEPS))
    save_file({n: p.detach().clone() for n, p in own(run[0]).items()}, folder / "end.safetensors")
"""


def test_9_in_a_fresh_process(tmp_path):
    from safetensors.torch import load_file

    rows = ["misa", "lisa", "velora_redrawn", "rso_and_all", "sparse_mezo", "lozo"]
    ends = {}
    for row in rows:
        run = begin(row, "plain", seed=0)
        advance(*run, "plain", range(SAVED))
        surgery.save(run[0], tmp_path / row, *run[1:])
        advance(*run, "plain", range(SAVED, SAVED + STEPS))
        ends[row] = run[0]
    processes.run(FRESH, tmp_path, [str(tmp_path), *rows])
    for row, model in ends.items():
        found = load_file(tmp_path / row / "end.safetensors")
        for name, parameter in own(model).items():
            assert torch.equal(parameter, found[name]), (row, name)


@pytest.mark.parametrize(
    ("row", "dtype"),
    [("misa", torch.bfloat16), ("rso", torch.bfloat16), ("rso", torch.float16)]
    + [("mezo", torch.float16)],
)
def test_9_in_16_bits(row, dtype, tmp_path):
    runs = []
    for _ in range(2):
        model = make("plain").to(dtype)
        surgery.apply(model, PASSES[row](period=4))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        runs.append((model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer)))
    advance(*runs[0], "plain", range(SAVED))
    surgery.save(runs[0][0], tmp_path, *runs[0][1:])
    surgery.load(runs[1][0], tmp_path, *runs[1][1:])
    for run in runs:
        advance(*run, "plain", range(SAVED, SAVED + 6))
    for name, parameter in own(runs[0][0]).items():
        assert torch.equal(parameter, own(runs[1][0])[name]), name


def test_a_journal_goes_on(tmp_path):
    run = begin("mezo", "plain", seed=0)
    advance(*run, "plain", range(4))
    surgery.save(run[0], tmp_path, *run[1:])
    other = resumed("mezo", "plain", tmp_path)
    assert torch.equal(surgery.journal(run[0]), surgery.journal(other[0]))


def test_weights_may_be_saved_beside(tmp_path):
    run = begin("rso", "llama", seed=0)
    advance(*run, "llama", range(SAVED))
    surgery.save(run[0], tmp_path, run[1], run[2], weights=False)
    run[0].save_pretrained(tmp_path)
    other = begin("rso", "llama", seed=5)
    with pytest.raises(surgery.CheckpointError, match=r"holds no weights .*model\.layers\.0"):
        surgery.load(other[0], tmp_path, *other[1:])
    model = type(run[0]).from_pretrained(tmp_path).train()
    surgery.apply(model, PASSES["rso"](period=2))
    again = (model, *optimizer_of(model))
    surgery.load(again[0], tmp_path, *again[1:])
    for each in (run, again):
        advance(*each, "llama", range(SAVED, SAVED + 5))
    for name, parameter in own(run[0]).items():
        assert torch.equal(parameter, own(model)[name]), name
