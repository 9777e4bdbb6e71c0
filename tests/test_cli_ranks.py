"""`torchrun ... surgery train`: the run of one process on the joined batch, stopped and resumed."""

from __future__ import annotations

import json

import commands
import processes
import pytest
import torch
from commands import run
from processes import free_port
from safetensors.torch import load_file

MAIN = "from surgery.cli import main; main()"
# A signal that one process hears after its third step.
HEARD = """
import gc, os, signal
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from surgery.cli import loop
destroy = distributed.destroy_process_group
def alone():
    held = [each for each in gc.get_objects() if isinstance(each, DistributedDataParallel)]
    assert not held, "it would end the group under Python's lock"
    destroy()
distributed.destroy_process_group = alone
make = loop.Loop._make_step
def step(self):
    values = make(self)
    if self.step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return values
loop.Loop._make_step = step
try:
    {main}
except SystemExit as ended:
    assert ended.code == 143, ended.code
"""


def run_two(code, folder, words):
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    env = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return processes.run(code, folder, *[list(map(str, words))] * 2, env=env)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_two_processes_make_the_run_of_one(wrap, tmp_path):
    words = ["train", commands.llama(), "--data", commands.text(), "--length", 16, "--steps", 4,
             "--lr", 0.01, "--pass", "misa:budget=0.4,period=2", "--optimizer", "adamw:eps=1e-4",
             "--clip", 1.0, "--held-out", 2]  # fmt: skip
    run(*words, "--batch", 4, "--out", tmp_path / "one")
    two = [*words, "--batch", 2, "--wrap", wrap, "--out", tmp_path / "two"]
    if wrap == "ddp":  # two captures more
        first, second = run_two(HEARD.format(main=MAIN), tmp_path, two)
        assert "stopped: step 3 of 4" in first and second == ""
    first, second = run_two(MAIN, tmp_path, two)
    assert "trained: " in first and second == ""
    losses = []
    for name in ("one", "two"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        read = [json.loads(line) for line in lines]
        losses.append([(r["step"], r.get("loss", r.get("evaluation"))) for r in read])
    assert [step for step, _ in losses[1]] == [1, 2, 3, 4, 4]
    torch.testing.assert_close(*[torch.tensor(each) for each in losses], rtol=1e-4, atol=1e-4)
    one, both = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("one", "two"))
    assert one.keys() == both.keys()
    for name in one:
        torch.testing.assert_close(one[name], both[name], rtol=1e-3, atol=1e-3)
