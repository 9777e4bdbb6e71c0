"""Several that save into one folder at once, or read what another replaces."""

from __future__ import annotations

import threading

import processes
import torch
from laws import own
from models import make

import passes
import surgery
from surgery.checkpoints import folder


def test_saves_at_once_keep_one_whole_save(tmp_path):
    models = [surgery.apply(make("plain", seed=s), passes.BAdam(period=2)) for s in range(4)]
    for round in range(40):
        threads = [threading.Thread(target=surgery.save, args=(m, tmp_path)) for m in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        other = surgery.apply(make("plain", seed=9), passes.BAdam(period=2))
        surgery.load(other, tmp_path)
        found = own(other)
        assert any(all(torch.equal(own(m)[n], v) for n, v in found.items()) for m in models), round
    surgery.save(models[0], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_that_another_save_tidies_first_does_not_stop_a_save(tmp_path, monkeypatch):
    model = surgery.apply(make("plain"), "badam")
    surgery.save(model, tmp_path)
    state = next(tmp_path.glob("surgery_state_*"))
    left = tmp_path / "surgery_state_000000000000.safetensors"
    left.write_bytes(b"of a killed save")
    hashed = folder._hash

    def other_is_faster(file):
        if file == left:
            file.unlink()
        return hashed(file)

    monkeypatch.setattr(folder, "_hash", other_is_faster)
    surgery.save(model, tmp_path)
    assert not left.exists() and state.exists()


def test_a_save_that_is_replaced_while_it_is_read_is_read_anew(tmp_path, monkeypatch):
    first, second, reader = (
        surgery.apply(make("plain", seed=s), passes.BAdam(period=2)) for s in range(3)
    )
    surgery.save(first, tmp_path)
    hashed, saves = folder._hash, iter([second])

    def other_saves_now(file):
        if other := next(saves, None):
            surgery.save(other, tmp_path)
        return hashed(file)

    monkeypatch.setattr(folder, "_hash", other_saves_now)
    surgery.load(reader, tmp_path)
    assert all(torch.equal(v, own(second)[n]) for n, v in own(reader).items())


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from laws import adamw, train
from models import make
import passes, surgery
from surgery.checkpoints.folder import read

folder, draw, steps = sys.argv[1], random.Random(0), []
for _ in range(50):
    begun, told = os.pipe()
    child = os.fork()  # before any backward, whose threads no fork survives
    if not child:
        model = surgery.apply(make("plain"), passes.Misa(budget=0.2, period=2))
        optimizer = adamw(model)
        if steps:
            surgery.load(model, folder, optimizer)
        train(model, "plain", 1, optimizer)
        surgery.save(model, folder, optimizer)
        os.write(told, b".")
        while True:  # saves as fast as it can, until it is killed
            train(model, "plain", 1, optimizer)
            surgery.save(model, folder, optimizer)
    assert os.read(begun, 1) == b"."
    time.sleep(draw.uniform(0.0, 0.2))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    steps.append(read(Path(folder))[1]["surgery"]["step"])
print(*steps)
"""


def test_killed_at_any_moment_of_a_save(tmp_path):
    (printed,) = processes.run(KILLED, tmp_path, [str(tmp_path / "saves")])
    steps = [int(step) for step in printed.split()]
    assert len(steps) == 50 and steps == sorted(steps) and steps[-1] > 50
    assert len([file for file in (tmp_path / "saves").iterdir() if "partial" not in file.name]) <= 3
