"""`surgery train` and `surgery export`: what is written, what is resumed, what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest
import torch
import transformers
from commands import TEXT, refused, run
from processes import ROOT
from safetensors.torch import load_file
from typer.testing import CliRunner

from surgery.cli import app, metrics, stopping
from surgery.cli.rows import language_rows, order, places_of


@pytest.fixture
def llama():
    return commands.llama()


@pytest.fixture
def text():
    return commands.text()


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rows_of(path: Path):
    records = [{"text": path.read_text()}]
    return language_rows(records, commands.tokenizer(), 16, None, "answers", "text")


SHORT = ["--length", 16, "--batch", 2, "--steps", 6, "--lr", 0.01, "--warmup", 2, "--seed", 3]


def test_train_learns_measures_and_exports(llama, text, tmp_path):
    run("train", llama, "--data", text, "--out", tmp_path, *SHORT, "--held-out", 2,
        "--evaluate-every", 3, "--pass", "misa:budget=0.4,period=2", "--pass", "chunked_loss",
        "--accumulate", 2, "--clip", 1.0)  # fmt: skip
    lines = lines_of(tmp_path)
    steps = [line for line in lines if "loss" in line]
    checks = [line["evaluation"] for line in lines if "evaluation" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(line["tokens_per_second"] > 0 and line["memory"] > 0 for line in steps)
    assert [line["lr"] for line in steps[:3]] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])
    assert len(checks) == 2 and checks[1] < checks[0]
    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == "<e>"
    # the run as a plain loop over the same rows
    rows = rows_of(text)
    held = rows.batch(order(len(rows.rows), 3, -1)[:2])
    assert trained(**held).loss.item() == pytest.approx(checks[1], abs=1e-5)
    run("export", tmp_path, tmp_path / "again")
    again, once = weights_of(tmp_path / "again"), weights_of(tmp_path / "model")
    assert again.keys() == once.keys() and all(torch.equal(again[n], once[n]) for n in once)


def test_exact_passes_train_as_a_plain_loop(llama, text, tmp_path):
    run("train", llama, "--data", text, "--out", tmp_path, *SHORT, "--held-out", 0)
    plain = transformers.AutoModelForCausalLM.from_pretrained(llama).train()
    rows = rows_of(text)
    mixed = [rows.rows[i] for i in order(len(rows.rows), 3, -1)]
    optimizer = torch.optim.AdamW(plain.parameters())
    factors = [1 / 3, 2 / 3, *(0.5 * (1 + _cos(i / 4)) for i in range(4))]
    losses = []
    for step, factor in enumerate(factors):
        optimizer.param_groups[0]["lr"] = 0.01 * factor
        chosen = next(places_of(step, 1, 2, len(mixed), 3))
        ids = torch.tensor([mixed[i].ids for i in chosen])
        loss = plain(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert [line["loss"] for line in lines_of(tmp_path)] == pytest.approx(losses, abs=1e-5)


def _cos(share: float) -> float:
    return float(torch.cos(torch.tensor(torch.pi * share, dtype=torch.float64)))


def test_accumulated_batches_are_one_large_batch(llama, tmp_path):
    data = tmp_path / "data.jsonl"
    sentences = ["the cat", "the cat sat on a mat", "a dog", "the dog ran up a hill and sat on a"]
    data.write_text("".join(json.dumps({"text": s}) + "\n" for s in sentences))
    options = ["--data", data, "--no-pack", "--steps", 3, "--length", 16, "--held-out", 0]
    options += ["--optimizer", "sgd", "--lr", 0.5]
    run("train", llama, *options, "--batch", 4, "--out", tmp_path / "one")
    run("train", llama, *options, "--batch", 2, "--accumulate", 2, "--out", tmp_path / "two")
    one, two = (weights_of(tmp_path / name / "model") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)


def test_train_a_classifier_from_a_table(llama, tmp_path):
    data = tmp_path / "data.csv"
    rows = [("good cat", "yes"), ("bad cat", "no"), ("good dog", "yes"), ("bad dog", "no")]
    data.write_text("said,what\n" + "".join(f"{a},{b}\n" for a, b in rows * 4))
    columns = ["--text-column", "said", "--label-column", "what"]
    run("train", llama, "--task", "classify", "--data", data, "--evaluation", data, *columns,
        "--out", tmp_path / "out", "--steps", 12, "--lr", 0.02, "--length", 8)  # fmt: skip
    assert lines_of(tmp_path / "out")[-1]["accuracy"] == 1.0
    kind = transformers.AutoModelForSequenceClassification
    trained = kind.from_pretrained(tmp_path / "out" / "model")
    assert trained.config.id2label == {0: "no", 1: "yes"}
    run("export", tmp_path / "out", tmp_path / "again")
    again = kind.from_pretrained(tmp_path / "again")
    assert again.config.id2label == {0: "no", 1: "yes"}
    assert torch.equal(again.score.weight, trained.score.weight)
    other = tmp_path / "other.csv"
    other.write_text("said,what\ncat,maybe\n")
    assert "maybe" in refused(
        "train", llama, "--task", "classify", "--data", data, "--evaluation", other, *columns,
        "--out", tmp_path / "third",
    )  # fmt: skip


def test_stopped_runs_go_on_to_the_bit(text, tmp_path):
    """In a process of its own, which SIGTERM ends; its screen holds what is ours."""
    config = transformers.GPT2Config(  # has dropout
        vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=64
    )
    config.save_pretrained(tmp_path)
    commands.tokenizer().save_pretrained(tmp_path)
    words = ["train", tmp_path / "config.json", "--data", text, "--length", 16, "--batch", 2,
             "--steps", 60, "--pass", "misa:budget=0.5,period=4", "--lr", 0.01,
             "--save-every", 0]  # fmt: skip
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    code = "import torch; torch.set_num_threads(1); from surgery.cli import main; main()"
    # Slow steps: it must be met in the middle.
    slow = "from surgery.cli.metrics import Metrics; import time; add = Metrics.add; "
    slow += "Metrics.add = lambda self, **v: (add(self, **v), time.sleep(0.05)); "
    process = subprocess.Popen(
        [sys.executable, "-c", slow + code, *map(str, words), "--out", str(stopped)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + 300
    while not (stopped / "metrics.jsonl").exists() or len(lines_of(stopped)) < 6:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    printed, said = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert printed.startswith("stopped: step ") and "Repeat the command" in printed
    ours = r"\d+ rows, .*|step \d+ of 60: loss .*"
    assert [line for line in said.splitlines() if not re.fullmatch(ours, line)] == []
    made = len([line for line in lines_of(stopped) if "loss" in line])
    assert 6 <= made < 60

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = run(*words, "--out", stopped)
        assert f"from step {made}" in found.stderr
        run(*words, "--out", whole)
    finally:
        torch.set_num_threads(threads)
    one, other = weights_of(stopped / "model"), weights_of(whole / "model")
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    kept = ("step", "loss", "lr", "evaluation")
    assert [[line.get(k) for k in kept] for line in lines_of(stopped)] == [
        [line.get(k) for k in kept] for line in lines_of(whole)
    ]


def test_a_killed_run_goes_on_from_its_last_checkpoint(llama, text, tmp_path, monkeypatch):
    words = ["train", llama, "--data", text, *SHORT, "--save-every", 4]
    run(*words, "--out", tmp_path / "whole")
    add = metrics.Metrics.add

    def fail(self, **values):
        if values["step"] == 6:
            raise KeyboardInterrupt  # as a second Ctrl-C does
        add(self, **values)

    monkeypatch.setattr(metrics.Metrics, "add", fail)
    CliRunner().invoke(app, [*map(str, words), "--out", str(tmp_path / "killed")])
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # half a line
    monkeypatch.setattr(metrics.Metrics, "add", add)
    assert "from step 4" in run(*words, "--out", tmp_path / "killed").stderr
    one, other = (weights_of(tmp_path / name / "model") for name in ("whole", "killed"))
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert [line["step"] for line in lines_of(tmp_path / "killed") if "loss" in line] == [
        1, 2, 3, 4, 5, 6,
    ]  # fmt: skip
    said = refused(*words, "--lr", 0.5, "--out", tmp_path / "killed")
    assert "lr was 0.01 and is 0.5" in said and "another --out" in said


@pytest.fixture
def interrupts():
    """Ctrl-C as at a terminal: jobs in the background are started to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_that_is_ignored_stays_so(interrupts):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stopping.Stopping() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        assert stop.number is None
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_the_first_signal_is_noted_and_the_second_acts(interrupts):
    with stopping.Stopping() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT and stop.code == 130
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("name", "content", "words", "said"),
    [
        ("no.txt", None, [], "cannot be read"),
        ("a.txt", "  \n", [], "holds nothing to learn from"),
        ("a.txt", "the cat", ["--length", 32], "fewer than a row of 32"),
        ("a.txt", TEXT, ["--length", 100], "more than the 64 positions"),
        ("a.jsonl", '{"text": "cat"}\n{"tex', [], "a.jsonl, line 2, is not JSON"),
        ("a.jsonl", '["cat"]', [], "is not an object"),
        ("a.jsonl", '{"content": "cat"}', [], "record 1 has no 'text'; its columns: content"),
        ("a.csv", "a,b\nc,d\n", ["--task", "classify"], "has no 'label'"),
        ("a.txt", TEXT, ["--task", "clasify"], "Did you mean 'classify'?"),
        ("a.txt", TEXT, ["--dtype", "float16"], "Use bfloat16"),
        ("a.txt", TEXT, ["--device", "cuda:77"], "--device cuda:77 cannot be used"),
        ("a.txt", TEXT, ["--batch", 0], "--batch 0 must be at least 1"),
        ("a.txt", TEXT, ["--length", 16, "--held-out", 999], "leaves none to learn from"),
        ("a.txt", TEXT, ["--pass", "misa:budget=7"], "lies in (0, 1]"),
        ("a.txt", TEXT, ["--tokenizer", "nowhere"], "no tokenizer in 'nowhere'"),
    ],
)
def test_train_refuses_bad_input_in_one_line(
    llama, tmp_path, monkeypatch, name, content, words, said
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if content is not None:
        (tmp_path / name).write_text(content)
    found = refused("train", llama, "--data", tmp_path / name, "--out", tmp_path / "out", *words)
    assert said in found
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_export_of_what_is_no_run_is_refused(tmp_path):
    assert "CheckpointError" in refused("export", tmp_path, tmp_path / "out")
