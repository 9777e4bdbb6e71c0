"""Exports and the files of others: what a folder held before, it holds after."""

from __future__ import annotations

import errno
import os
import platform
import re
import resource
import shutil
import signal
import stat
import tempfile
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import processes
import pytest
import torch
import transformers
from laws import train, weights
from models import adapt, make
from test_export import loaded, same_outputs

import passes
import surgery

pytestmark = pytest.mark.filterwarnings("ignore:.*scalars that", "ignore:Model config")


MINE = ("model_ema.safetensors", "model-best.safetensors", "notes.txt", "README.md")


def test_what_somebody_else_has_put_into_the_folder_stays(tmp_path):
    for name in (*MINE, "adapters/mine.bin", "model-00001-of-00002.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    model = adapt(surgery.apply(make("llama"), "recompute"), "lora")
    for options in ({"max_shard_size": "20KB"}, {}, {"merge": True}, {"max_shard_size": "20KB"}):
        surgery.export(model, tmp_path, **options)
        for name in (*MINE, "adapters/mine.bin"):
            assert (tmp_path / name).read_text() == "mine", (name, options)
        assert "trained by model surgery" in (tmp_path / "SURGERY.md").read_text()
        loaded(transformers.AutoModelForCausalLM, tmp_path)
        assert (tmp_path / "adapters" / "adapter_config.json").exists() != bool(
            options.get("merge")
        )
    assert (tmp_path / "model-00001-of-00002.safetensors").read_text() == "mine"


def test_weights_of_others_that_would_be_loaded_instead_are_an_error(tmp_path):
    (tmp_path / "model.safetensors").write_text("mine")
    model = surgery.apply(make("llama"), "badam")
    with pytest.raises(surgery.CheckpointError, match="would be loaded in place of"):
        surgery.export(model, tmp_path, max_shard_size="20KB")
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_text() == "mine"


@pytest.mark.parametrize("before", ["20KB", "50GB"])
@pytest.mark.parametrize("after", ["20KB", "50GB"])
def test_a_process_that_is_killed_leaves_one_whole_checkpoint(before, after, tmp_path, monkeypatch):
    model = surgery.apply(make("llama", num_hidden_layers=2), passes.BAdam(period=2))
    surgery.export(model, tmp_path / "run", max_shard_size=before)
    old = weights(model)
    train(model, "llama", 2)
    new = weights(model)
    calls = 0
    plain = {name: getattr(Path, name) for name in ("replace", "unlink")}

    def dying(name, *args):
        nonlocal calls
        calls += 1
        if calls > lives:
            raise KeyboardInterrupt
        return plain[name](*args)

    for lives in range(40):
        calls = 0
        shutil.rmtree(tmp_path / "now", ignore_errors=True)
        shutil.copytree(tmp_path / "run", tmp_path / "now")
        with monkeypatch.context() as patch:
            for name in plain:
                patch.setattr(Path, name, _dying(partial(dying, name)))
            with nullcontext() if lives == 39 else suppress(KeyboardInterrupt):
                surgery.export(model, tmp_path / "now", max_shard_size=after)
        found = weights(loaded(transformers.AutoModelForCausalLM, tmp_path / "now"))
        assert any(all(torch.equal(found[n], v) for n, v in each.items()) for each in (old, new))
        if calls <= lives:
            assert all(torch.equal(found[n], v) for n, v in new.items())
            break
    assert 3 < lives < 39
    assert sorted(f.name for f in tmp_path.iterdir()) == ["now", "run"]


@pytest.mark.parametrize("ending", ["killed", "interrupted"])
@pytest.mark.parametrize("sizes", [("20KB", "30KB", "20KB"), ("20KB", "50GB", "30KB")])
def test_what_killed_exports_have_placed_goes_with_the_next(sizes, ending, tmp_path, monkeypatch):
    model = surgery.apply(make("llama", num_hidden_layers=2), passes.BAdam(period=2))
    before, during, after = sizes
    surgery.export(model, tmp_path / "run", max_shard_size=before)
    (tmp_path / "run" / "model-00007-of-00009.safetensors").write_text("mine")
    surgery.export(model, tmp_path / "whole", max_shard_size=after)
    whole = {f.name.replace("-b-", "-") for f in (tmp_path / "whole").iterdir()}
    plain = Path.replace

    def dying(path, target):
        nonlocal calls
        calls += 1
        if calls > lives:
            raise KeyboardInterrupt
        return plain(path, target)

    for lives in range(40):
        now = tmp_path / "now"
        shutil.rmtree(now, ignore_errors=True)
        shutil.copytree(tmp_path / "run", now)
        for _ in range(2):  # and the one that comes next, too
            calls = 0
            with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
                patch.setattr(Path, "replace", dying)
                if ending == "killed":
                    patch.setattr("surgery.checkpoints.plain.abandon", lambda made: None)
                surgery.export(model, now, max_shard_size=during)
            for left in now.glob(f".surgery.partial.*.{os.getpid()}.*"):
                left.rename(now / left.name.replace(f".{os.getpid()}.", f".{2**30}."))
        surgery.export(model, now, max_shard_size=after)
        found = {re.sub(r"-[b-g]\d*-", "-", f.name) for f in now.iterdir()}
        assert len(list(now.iterdir())) == len(found)
        assert found - {"model-00007-of-00009.safetensors"} == whole, lives
        assert "mine" in (now / "model-00007-of-00009.safetensors").read_text()
        loaded(transformers.AutoModelForCausalLM, now)
        if calls <= lives:
            break
    assert 3 < lives < 39


def test_shards_that_killed_exports_have_left_are_in_nobodys_way(tmp_path):
    model = surgery.apply(make("llama"), "recompute")
    for letter in ("", "b-", "c-", "d-", "e-", "f-", "g-", "g0-"):
        (tmp_path / f"model-{letter}00001-of-00005.safetensors").write_text("left")
    before = held(tmp_path)
    surgery.export(model, tmp_path, max_shard_size="20KB")
    shards = {f.name for f in tmp_path.glob("*-of-*")} - before.keys()
    assert shards == {f"model-g1-0000{i}-of-00005.safetensors" for i in range(1, 6)}
    assert before.items() <= held(tmp_path).items()
    loaded(transformers.AutoModelForCausalLM, tmp_path)


def test_into_a_folder_that_is_mounted_from_another_disk(tmp_path, monkeypatch):
    model = surgery.apply(make("plain"), "badam")
    folder = tmp_path / "mounted"
    folder.mkdir()
    left = folder / f".surgery.partial.{platform.node()}.{2**30}.0"  # of a process that is gone
    left.mkdir()
    plain = Path.replace

    def replace(path, target):
        if folder not in path.parents:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return plain(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    surgery.export(model, folder)
    assert sorted(f.name for f in folder.iterdir()) == ["README.md", "model.safetensors"]
    assert [f.name for f in tmp_path.iterdir()] == ["mounted"]


def _dying(call):
    return lambda path, *args, **kwargs: call(path, *args)


def test_an_exported_folder_has_the_usual_mode(tmp_path):
    before = os.umask(0o022)
    try:
        surgery.export(surgery.apply(make("plain"), "badam"), tmp_path / "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o755
    modes = {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "new").iterdir()}
    assert modes == {0o644}


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}, {"merge": True}], ids=str)
def test_a_full_disk_leaves_the_old_export(options, tmp_path):
    model = surgery.apply(adapt(make("llama"), "lora"), "recompute")
    surgery.export(model, tmp_path / "run", **options)
    before = held(tmp_path / "run")
    largest = max(map(len, before.values()))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the kernel's error instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, -1))
    try:
        with pytest.raises(surgery.CheckpointError, match=r"File too large.*Free some space"):
            surgery.export(model, tmp_path / "run", **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert held(tmp_path / "run") == before
    assert [f.name for f in tmp_path.iterdir()] == ["run"]


def held(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


READ_ONLY = """
import os, sys
from pathlib import Path
from models import make
import surgery

model = surgery.apply(make("plain"), "badam")
folder = Path(sys.argv[1])
folder.parent.chmod(0o755)
for write in (surgery.save, surgery.export):
    write(model, folder / write.__name__)
    (folder / write.__name__).chmod(0o555)
folder.chmod(0o555)
if not os.geteuid():  # who may write anywhere
    os.setuid(65534)
for write in (surgery.save, surgery.export):
    for name in (write.__name__, "new"):
        try:
            write(model, folder / name)
        except surgery.CheckpointError as error:
            said = [each in str(error) for each in ("could not", "Permission")]
            print(f"{write.__name__} {name}:", *said)
"""


def test_a_folder_that_cannot_be_written_to_keeps_what_it_holds():
    with tempfile.TemporaryDirectory() as parent:  # pytest's own is closed to other users
        folder = Path(parent) / "run"
        folder.mkdir()
        (printed,) = processes.run(READ_ONLY, Path(parent), [str(folder)])
        assert printed.splitlines() == [
            f"{verb} {name}: True True" for verb in ("save", "export") for name in (verb, "new")
        ]
        assert sorted(f.name for f in folder.iterdir()) == ["export", "save"]
        names = sorted(f.name for f in folder.rglob("*") if f.is_file())
        assert names[:2] == ["README.md", "model.safetensors"] and len(names) == 4
        surgery.load(surgery.apply(make("plain", seed=3), "badam"), folder / "save")
        for each in folder.iterdir():
            each.chmod(0o755)
        folder.chmod(0o755)


def test_into_a_folder_behind_a_link_with_a_name_in_unicode(tmp_path):
    (tmp_path / "größe 模型").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "größe 模型")
    model = surgery.apply(make("llama"), "badam")
    surgery.export(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    same_outputs(model, loaded(transformers.AutoModelForCausalLM, tmp_path / "link"), "llama")
