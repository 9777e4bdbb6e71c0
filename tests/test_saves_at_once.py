"""Several that save into one folder at once, or read what another replaces."""

from __future__ import annotations

import threading

import torch
from laws import own
from models import make

import passes
import surgery
from surgery.checkpoints import folder


def test_saves_at_once_keep_one_whole_save(tmp_path):
    models = [surgery.apply(make("plain", seed=s), passes.BAdam(period=2)) for s in range(4)]
    for round in range(5):
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
