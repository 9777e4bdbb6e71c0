"""The examples, on the first two layers of SmolLM2: they learn, and leave what they promise."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import nbformat
import processes
import pytest
import transformers
from nbclient import NotebookClient
from peft import PeftModel
from safetensors.torch import load_file

import surgery
from examples import chat_sft

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other people's code
EXAMPLES = processes.ROOT / "examples"
OWN = ["train", "chat_sft", "dpo", "qlora", "distill", "fit", "resume", "sharded"]
TWO = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]  # processes
NUMBER = r"([\d.]+)"


@pytest.fixture
def text(tmp_path) -> Path:
    """One sentence again and again: whichever rows a step draws, it can be learned."""
    file = tmp_path / "own.txt"
    file.write_text("And God said, Let there be light: and there was light. " * 40)
    return file


@pytest.fixture
def run(small, capsys):
    """Call an example as the command line does, without a process; return what it prints."""

    def called(example: str, data: Path | None = None, **options: Any) -> str:
        named = "teacher" if example == "distill" else "model"
        import_module(f"examples.{example}").main(
            **({"data": data} if data else {}), **{named: str(small / "model")}, **options
        )
        return capsys.readouterr().out

    return called


def losses(output: str, name: str = "loss") -> list[float]:
    return [float(each) for each in re.findall(rf"step \d+ of \d+, {name} {NUMBER}", output)]


def loads(folder: Path) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model


# -- on data of one's own --------------------------------------------------------------------------


def test_train_has_at_most_80_lines():
    assert len((EXAMPLES / "train.py").read_text().splitlines()) <= 80


@pytest.mark.parametrize("example", OWN)
def test_outside_of_a_clone_an_example_asks_for_data(example, monkeypatch):
    monkeypatch.setitem(sys.modules, "examples.real", None)  # an import of it fails
    with pytest.raises(SystemExit, match=rf"^Which .*{example}\.py \w+\.(txt|jsonl)[^\n]*$"):
        import_module(f"examples.{example}").main()


@pytest.mark.parametrize("example", ["train", "chat_sft", "dpo"])
def test_records_that_lack_something_are_an_error_in_one_line(example, run, tmp_path):
    (tmp_path / "data.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(SystemExit, match=r"^\S+data\.jsonl.* (without|has no) [^\n]*$"):
        run(example, tmp_path / "data.jsonl")


@pytest.mark.real
def test_train(small, text, tmp_path):
    """As a script, from another folder, with nothing of the repository but itself."""
    lines = [json.dumps({"text": part}) for part in text.read_text().split(". ")]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    script = f"import runpy; runpy.run_path({str(EXAMPLES / 'train.py')!r}, run_name='__main__')"
    options = ["own.jsonl", "--model", str(small / "model"), "--out", "out", "--lr", "3e-3"]
    options += ["--steps", "6", "--length", "32", "--batch", "2"]
    code = f"import os; os.chdir({str(tmp_path)!r})\n{script}"
    output = processes.run(code, tmp_path, options)[0]
    found = losses(output)
    assert len(found) == 6 and found[-1] < found[0] and "tokens/s" in output
    trained, start = loads(tmp_path / "out"), loads(small / "model")
    moved = [n for n, p in start.named_parameters() if not p.equal(trained.get_parameter(n))]
    assert moved and all("proj" in name for name in moved)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out")


@pytest.mark.real
def test_resume(run, text, tmp_path):
    options = {"steps": 7, "length": 32}
    whole = run("resume", text, out=tmp_path / "whole", **options).splitlines()
    begun = run("resume", text, out=tmp_path / "parts", stop=3, **options).splitlines()
    ended = run("resume", text, out=tmp_path / "parts", **options).splitlines()
    assert [*begun[:-1], *ended] == whole and len(whole) == 8 and len(begun) == 4
    assert "checksum" in whole[-1] and begun[-1] != whole[-1]
    states = [
        load_file(next((tmp_path / each / "run").glob("*.safetensors")))
        for each in ("whole", "parts")
    ]
    assert all(tensor.equal(states[1][name]) for name, tensor in states[0].items())


@pytest.mark.real
def test_fit(run, text):
    output = run("fit", text, memory="400MiB", length=32, steps=3, lr=3e-3)
    assert "Recommended:" in output and "surgery.apply(model, ['misa'])" in output
    found = losses(output)
    assert len(found) == 3 and found[-1] < found[0]
    peak = re.search(rf"activations\W+{NUMBER} MB predicted, {NUMBER} MB measured", output)
    assert peak and float(peak[2]) == pytest.approx(float(peak[1]), rel=0.05)


@pytest.mark.real
def test_qlora(run, small, text, tmp_path):
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    found = losses(run("qlora", text, out=out, steps=4, batch=1, length=32, lr=5e-3))
    assert len(found) == 4 and found[-1] < found[0]
    loaded = PeftModel.from_pretrained(loads(small / "model"), out)
    trained = [p for n, p in loaded.named_parameters() if "lora_B" in n]
    assert len(trained) == 14 and all(p.count_nonzero() for p in trained)


@pytest.mark.real
def test_dpo(run, tmp_path):
    output = run("dpo", out=tmp_path, steps=6, length=64, lr=1e-3)
    found = losses(output)
    assert found[0] == pytest.approx(0.693, abs=1e-3) and found[-1] < 0.6
    assert output.splitlines()[-1].endswith("100% prefer what was chosen")
    loads(tmp_path)


@pytest.mark.real
def test_distill(run, text, tmp_path):
    output = run("distill", text, out=tmp_path, steps=5, length=32, lr=1e-3)
    found = losses(output, "divergence")
    assert len(found) == 5 and found[-1] < found[0]
    assert loads(tmp_path).config.num_hidden_layers == 1


@pytest.mark.real
def test_a_chat_goes_on_where_it_was_stopped(run, small, tmp_path, monkeypatch, capsys):
    tokenizer = transformers.AutoTokenizer.from_pretrained(small / "model")
    talks = [
        [
            {"role": "user", "content": f"What is {n} + 1?"},
            {"role": "assistant", "content": f"It is {n + 1}."},
        ]
        for n in range(6)
    ]
    row = chat_sft.example(tokenizer, talks[3], 512)
    counted = row["input_ids"][row["labels"] != chat_sft.IGNORED]
    assert tokenizer.decode(counted).startswith("It is 4.") and 5 < len(counted) < 10
    data = tmp_path / "chats.jsonl"
    data.write_text("\n".join(json.dumps({"messages": messages}) for messages in talks))

    def train(out: str) -> list[str]:
        options = {"batch": 2, "epochs": 2, "lr": 1e-3, "save_every": 2}
        return run("chat_sft", data, out=tmp_path / out, **options).splitlines()

    whole = train("whole")
    losses = [float(line.split()[-1]) for line in whole[:-1]]
    assert len(losses) == 6 and losses[-1] < losses[0]
    save = surgery.save

    def interrupted(*args):
        save(*args)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(surgery, "save", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit, match="the same command goes on from here"):
        train("parts")
    signal.signal(signal.SIGINT, handler)
    monkeypatch.setattr(surgery, "save", save)
    first = capsys.readouterr().out.splitlines()
    said, *rest = train("parts")
    assert said.endswith("goes on behind step 2 of 6") and first + rest == whole
    with pytest.raises(SystemExit, match=r"holds a run with epochs=2, lr=0\.001: choose another"):
        run("chat_sft", data, out=tmp_path / "parts", batch=2, epochs=3, lr=1e-4)
    with pytest.raises(SystemExit, match="there is no file"):
        run("chat_sft", tmp_path / "none.jsonl", out=tmp_path / "none")
    for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert tensor.equal(load_file(tmp_path / "parts" / "model.safetensors")[name]), name


def sharded(*options: str) -> list[str]:
    return ["--steps", "5", "--length", "32", "--lr", "3e-3", *options]


@pytest.mark.real
def test_sharded_by_fsdp2(small, text, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = [
        {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        | {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for rank in "01"
    ]
    options = sharded(str(text), "--model", str(small / "model"), "--out", str(tmp_path / "out"))
    said = processes.run(processes.module("examples.sharded"), tmp_path, options, options, env=env)
    found = losses(said[0])
    assert len(found) == 5 and found[-1] < found[0] and not said[1]
    loads(tmp_path / "out")


@pytest.mark.real
def test_sharded_by_ddp_under_torchrun(small, text, tmp_path):
    command = [sys.executable, "-W", "ignore", *TWO, str(EXAMPLES / "sharded.py"), str(text)]
    command += ["--model", str(small / "model"), "--pass", "misa", "--wrap", "ddp"]
    done = subprocess.run(
        [*command, *sharded("--out", str(tmp_path / "out"))],
        cwd=processes.ROOT,
        env=os.environ | {"PYTHONPATH": str(processes.ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = losses(done.stdout)
    assert len(found) == 5 and found[-1] < found[0]
    loads(tmp_path / "out")


@pytest.mark.real
def test_first_steps(small, tmp_path, monkeypatch):
    """The notebook as it stands, in a kernel of its own."""
    book = nbformat.read(EXAMPLES / "first_steps.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells), "store it without outputs"
    for cell in book.cells:
        cell.source = cell.source.replace(
            "HuggingFaceTB/SmolLM2-135M-Instruct", str(small / "model")
        )
    monkeypatch.setenv("PYTHONPATH", str(processes.ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(book, timeout=300, kernel_name="python3", resources=where).execute()
    outputs = [each for cell in book.cells for each in cell.get("outputs", [])]
    said = "".join(each.get("text", "") for each in outputs if each.get("name") == "stdout")
    before, after = map(float, re.search(rf"held-out loss {NUMBER} -> {NUMBER}", said).groups())
    assert after < before
    assert any("image/png" in each.get("data", {}) for each in outputs)
    last = book.cells[-2].outputs[-1]["text"]
    assert last.startswith("The for statement is used to") and len(last) > 40
    loads(tmp_path / "out" / "first_steps")


# -- of the repository -----------------------------------------------------------------------------


@pytest.mark.real
def test_finetune(run, tmp_path):
    method = "misa,recompute,chunked_loss"
    output = run("finetune", method=method, steps=6, period=3, length=32, out=tmp_path)
    found = re.search(rf"held-out loss {NUMBER} -> {NUMBER}", output)
    assert found and float(found[2]) < float(found[1])
    totals = re.search(r"total\D+([\d.,]+) MB\D+([\d.,]+) MB", output)
    assert totals and float(totals[2].replace(",", "")) < float(totals[1].replace(",", ""))
    loads(tmp_path)


@pytest.mark.real
def test_forwards_alone(run, tmp_path):
    output = run("forwards_only", method="lozo", steps=12, length=16, out=tmp_path)
    found = re.search(rf"held-out loss {NUMBER} -> {NUMBER}", output)
    assert found and float(found[2]) < float(found[1])
    assert load_file(tmp_path / "journal.safetensors")["journal"].shape == (12, 5)


@pytest.mark.real
@pytest.mark.parametrize(("example", "options"), [("trainer", {"method": "rso"}), ("adapters", {})])
def test_what_is_resumed_or_loaded_is_the_same(example, options, run, tmp_path):
    output = run(example, steps=4, length=32, out=tmp_path, **options)
    found = re.search(rf"held-out loss {NUMBER} -> {NUMBER}, .* {NUMBER}", output)
    assert found and float(found[2]) < float(found[1])
    assert found[3] == found[2]
