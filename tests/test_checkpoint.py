"""Saves that are damaged, foreign, of another run or interrupted: an error, nothing changed."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from laws import adamw, own, state_of, train, weights
from models import layers, make

import passes
import surgery
from surgery.catalogue import from_json
from surgery.checkpoints import folder as saves
from surgery.contract.options import to_json

RECORD = "surgery_config.json"


@pytest.fixture(scope="module")
def one_save(tmp_path_factory):
    model = surgery.apply(make("plain"), passes.Misa(budget=0.2, period=2))
    optimizer = train(model, "plain", 3)
    surgery.save(model, folder := tmp_path_factory.mktemp("save"), optimizer)
    return folder


@pytest.fixture
def saved(one_save, tmp_path):
    return shutil.copytree(one_save, tmp_path, dirs_exist_ok=True)


def fresh(**options):
    model = make("plain", seed=5)
    surgery.apply(model, passes.Misa(**{"budget": 0.2, "period": 2} | options))
    return model, adamw(model)


def refused(folder: Path, match: str, *given) -> None:
    """Loading says so, and changes neither weights nor optimizer nor rounds."""
    model, optimizer = given or fresh()
    before, step = weights(model), state_of(model).clock.step
    active = [c.active for c in surgery.coordinates(model)]
    with pytest.raises(surgery.CheckpointError, match=match):
        surgery.load(model, folder, optimizer)
    assert all(torch.equal(p, before[n]) for n, p in own(model).items())
    assert state_of(model).clock.step == step
    assert [c.active for c in surgery.coordinates(model)] == active
    assert optimizer is None or not optimizer.state


def file_of(folder: Path) -> Path:
    return folder / json.loads((folder / RECORD).read_text())["state"]["file"]


def test_every_region_of_both_files_corrupted_in_turn(saved):
    model, optimizer = fresh()
    before = weights(model)
    for file, count in ((file_of(saved), 160), (saved / RECORD, 40)):
        content = file.read_bytes()
        draw = random.Random(0)
        for region in range(count):
            start = len(content) * region // count
            place = draw.randrange(start, max(start + 1, len(content) * (region + 1) // count))
            changed = bytearray(content)
            changed[place] ^= 1 << draw.randrange(8)
            file.write_bytes(bytes(changed))
            with pytest.raises(surgery.CheckpointError):
                surgery.load(model, saved, optimizer)
            assert all(torch.equal(p, before[n]) for n, p in own(model).items()), (file, place)
        file.write_bytes(content)
    assert not optimizer.state and state_of(model).clock.step == 0
    surgery.load(model, saved, optimizer)
    assert state_of(model).clock.step == 3


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_files(saved, share):
    for file, match in ((saved / RECORD, "damaged"), (file_of(saved), "cut off")):
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))])
        refused(saved, match)
        file.write_bytes(content)


def rewrite(folder: Path, **changes) -> None:
    content = json.loads((folder / RECORD).read_text()) | changes
    (folder / RECORD).write_text(saves._sealed(content))


def test_other_formats_and_foreign_files(saved, tmp_path):
    rewrite(saved, format=2)
    refused(saved, r"is of format 2, and this library reads up to 1\. pip install")
    rewrite(saved, format="1")
    refused(saved, "was not written by surgery.save")
    rewrite(saved, format=1, surprise=1)
    refused(saved, "unknown keys surprise")
    (saved / RECORD).write_text("[1, 2]")
    refused(saved, "no format number")
    file_of_another = tmp_path / "elsewhere"
    file_of_another.mkdir()
    torch.save({"weight": torch.zeros(2)}, file_of_another / "optimizer.pt")
    refused(file_of_another, r"holds no save.*There is optimizer\.pt.*pickles.*never loaded")
    refused(tmp_path / "nowhere", "holds no save of surgery")


def test_a_state_file_that_is_not_there(saved):
    file_of(saved).unlink()
    refused(saved, "is missing")


def test_a_state_file_of_another_save(saved, tmp_path):
    model = surgery.apply(make("plain"), passes.Misa(budget=0.2, period=2))
    surgery.save(model, tmp_path / "other", train(model, "plain", 3))
    file_of(saved).write_bytes(file_of(tmp_path / "other").read_bytes() + b" ")
    refused(saved, "not the file that was saved")


def test_other_passes_and_options(saved):
    refused(saved, r"misa\(budget=0\.2\), but budget=0\.3 was applied", *fresh(budget=0.3))
    model = surgery.apply(make("plain"), passes.BAdam())
    refused(saved, r"saved with misa, but badam was applied.*saved_passes", model, adamw(model))
    assert surgery.saved_passes(saved) == [passes.Misa(budget=0.2, period=2)]


def test_a_save_that_names_an_option_as_it_was_called(saved):
    """Old names of options are read, and compared by value."""
    held = json.loads((saved / RECORD).read_text())["passes"]
    options = held[0]["options"]
    options["smoothing"] = options.pop("ema_decay")
    rewrite(saved, passes=held)
    assert surgery.saved_passes(saved) == [passes.Misa(budget=0.2, period=2)]
    model, optimizer = fresh()
    surgery.load(model, saved, optimizer)
    assert state_of(model).clock.step == 3
    options["smoothing"] = 0.1
    rewrite(saved, passes=held)
    refused(saved, r"misa\(ema_decay=0\.1\), but ema_decay=0\.8 was applied", *fresh())


def test_another_architecture(saved):
    for family, match in (
        ("llama", "such as embed.weight"),
        ("bert", "of its weights are not in this model, such as embed.weight; 44 weights"),
    ):
        model = make(family, **layers(family, 2))
        surgery.apply(model, passes.Misa(budget=0.2, period=2))
        refused(saved, match, model, adamw(model))
    model = make("plain").to(torch.bfloat16)
    surgery.apply(model, passes.Misa(budget=0.2, period=2))
    refused(saved, r"is bfloat16 \(.*\) here, but float32", model, adamw(model))


def test_another_partition(tmp_path):
    model = surgery.apply(
        make("llama", num_hidden_layers=2), passes.Rso(rank=4, targets=["q_proj"])
    )
    surgery.save(model, tmp_path)
    other = make("llama", num_hidden_layers=2)
    other.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    surgery.apply(other, passes.Rso(rank=4, targets=["q_proj"]))
    with pytest.raises(surgery.CheckpointError, match=r"another partition.*layers\.0\.self_attn"):
        surgery.load(other, tmp_path)


def test_optimizers_that_do_not_fit(saved, tmp_path):
    refused(saved, "holds the state of an optimizer, but none is given", fresh()[0], None)
    model, _ = fresh()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    refused(saved, "made with AdamW, but SGD is given", model, sgd)
    model, _ = fresh()
    part = torch.optim.AdamW(list(model.parameters())[:-1], lr=1e-3)
    refused(saved, "parameter groups of AdamW are not those of the save", model, part)
    model, optimizer = fresh()
    surgery.save(model, tmp_path / "bare")
    refused(tmp_path / "bare", "saved without an optimizer", model, optimizer)
    surgery.load(model, saved, optimizer=False)
    assert state_of(model).clock.step == 3
    stranger = torch.optim.AdamW([*model.parameters(), torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(surgery.CheckpointError, match="holds 1 parameters that are not"):
        surgery.save(model, tmp_path / "bare", stranger)


def test_schedulers(saved, tmp_path):
    model, optimizer = fresh()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5])
    with pytest.raises(surgery.CheckpointError, match="without a scheduler"):
        surgery.load(model, saved, optimizer, scheduler)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    surgery.save(model, tmp_path / "both", optimizer, scheduler)
    with pytest.raises(surgery.CheckpointError, match="state of a scheduler"):
        surgery.load(model, tmp_path / "both", optimizer)
    model, optimizer = fresh()
    again = torch.optim.lr_scheduler.MultiStepLR(optimizer, [9])
    surgery.load(model, tmp_path / "both", optimizer, again)
    assert again.state_dict() == scheduler.state_dict()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)


def test_load_before_apply(saved):
    with pytest.raises(surgery.ModelError, match="nothing was applied"):
        surgery.load(make("plain"), saved)
    with pytest.raises(surgery.ModelError, match="nothing was applied"):
        surgery.save(make("plain"), saved)


def test_what_cannot_be_saved_without_pickling(tmp_path):
    model, optimizer = fresh()
    optimizer.param_groups[0]["hook"] = object()
    with pytest.raises(surgery.CheckpointError, match=r"groups/0/hook is a object"):
        surgery.save(model, tmp_path / "new", optimizer)
    assert not (tmp_path / "new" / RECORD).exists()


def test_a_folder_that_is_a_file_or_not_writable(saved, tmp_path):
    model, _ = fresh()
    (tmp_path / "file").write_text("")
    with pytest.raises(surgery.CheckpointError, match="could not save to"):
        surgery.save(model, tmp_path / "file")
    if os.geteuid() != 0:  # root may write anywhere
        saved.chmod(0o500)
        with pytest.raises(surgery.CheckpointError, match="could not save to"):
            surgery.save(model, saved)
        saved.chmod(0o700)


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_a_full_disk_leaves_the_previous_save(saved, share):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    model, _ = fresh()
    optimizer = train(model, "plain", 3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the kernel's error instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * file_of(saved).stat().st_size), -1))
    try:
        with pytest.raises(surgery.CheckpointError, match=r"File too large.*untouched"):
            surgery.save(model, saved, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a file system")
def test_a_full_tmpfs_leaves_the_previous_save(tmp_path):
    model = surgery.apply(make("plain"), passes.Misa(budget=0.2, period=2))
    command = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        surgery.save(model, tmp_path)
        optimizer = train(model, "plain", 3)
        before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        with pytest.raises(surgery.CheckpointError, match=r"No space left.*untouched"):
            surgery.save(model, tmp_path, optimizer)
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_options_make_the_round_trip():
    for name in surgery.available():
        spec = surgery.contract.registry._PASSES[name]()
        assert from_json(json.loads(json.dumps(to_json(spec)))) == spec
    changed = passes.Misa(budget=0.1, always=("norm", "bias"), targets=["up"], span=2)
    again = from_json(json.loads(json.dumps(to_json(changed))))
    assert to_json(again) == to_json(changed)
    with pytest.raises(surgery.OptionError, match=r"no option 'budgett'.*budget"):
        from_json({"name": "misa", "options": {"budgett": 0.1}})
    with pytest.raises(surgery.OptionError, match="on_resample was the function"):
        from_json(json.loads(json.dumps(to_json(passes.Rso(on_resample=passes.rso.transport)))))
