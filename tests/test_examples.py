"""The README's main job and the command line, as a user runs them, on the real model."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

import surgery
from examples import chat_sft
from examples.real import smollm2
from surgery.cli import app

TWO = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]  # processes


def run(command: list[str], folder: Path, ranks: int = 1) -> str:
    """Run an example with its arguments; return what it (the first rank) prints."""
    example, *arguments = command
    port = str(free_port())
    env = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        | {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for rank in range(ranks)
    ]
    code = processes.module(f"examples.{example}")
    return processes.run(code, folder, *[arguments] * ranks, env=env if ranks > 1 else [])[0]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.mark.real
@pytest.mark.parametrize(
    "method",
    ["misa,recompute,chunked_loss,compress", "velora"],
)
def test_finetune_smollm2_on_the_kjv(method, tmp_path):
    command = ["finetune", "--layers", "2", "--steps", "6"]
    command += ["--period", "3", "--length", "32", "--pass", method, "--out", str(tmp_path / "out")]
    output = run(command, tmp_path)
    losses = re.search(r"held-out loss ([\d.]+) -> ([\d.]+)", output)
    assert losses and float(losses[2]) < float(losses[1])
    totals = re.search(r"total\D+([\d.,]+) MB\D+([\d.,]+) MB", output)
    assert totals and float(totals[2].replace(",", "")) < float(totals[1].replace(",", ""))
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.num_hidden_layers == 2


@pytest.mark.real
def test_forwards_alone(tmp_path):
    command = ["forwards_only", "--pass", "lozo", "--layers", "1"]
    command += ["--steps", "12", "--length", "16", "--out", str(tmp_path / "out")]
    output = run(command, tmp_path)
    losses = re.search(r"held-out loss ([\d.]+) -> ([\d.]+)", output)
    assert losses and float(losses[2]) < float(losses[1])
    with safe_open(tmp_path / "out" / "journal.safetensors", "pt") as file:
        assert file.get_tensor("journal").shape == (12, 5)


@pytest.mark.real
@pytest.mark.parametrize(
    ("example", "more"),
    [("trainer", ["--pass", "rso"]), ("adapters", [])],
)
def test_integrations(example, more, tmp_path):
    command = [example, *more, "--layers", "1", "--steps", "4"]
    command += ["--length", "32", "--out", str(tmp_path / "out")]
    output = run(command, tmp_path)
    losses = re.search(r"held-out loss ([\d.]+) -> ([\d.]+), .* ([\d.]+)", output)
    assert losses and float(losses[2]) < float(losses[1])
    assert losses[3] == losses[2]


def trains_and_exports(output: str) -> None:
    losses = re.search(r"held-out loss ([\d.]+) -> ([\d.]+); plain checkpoint: (\S+)", output)
    assert losses and float(losses[2]) < float(losses[1])
    _, info = transformers.AutoModelForCausalLM.from_pretrained(losses[3], output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.real
@pytest.mark.parametrize(
    ("command", "ranks"),
    [
        (["sft"], 1),
        (["fabric", "--pass", "rso"], 1),
        (["accelerated"], 1),
        (["sharded"], 2),
        (["dpo"], 1),
        (["distill", "--layers", "2"], 1),
    ],
    ids=["sft", "fabric", "accelerate", "fsdp2", "dpo", "distill"],
)
def test_other_loops(command, ranks, tmp_path):
    example, *more = command
    options = ["--layers", "1", "--steps", "4", "--length", "32", "--out", str(tmp_path / "out")]
    trains_and_exports(run([example, *options, *more], tmp_path, ranks))


@pytest.mark.real
def test_under_torchrun(tmp_path):
    options = ["--layers", "1", "--steps", "4", "--length", "32", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *TWO, "examples.sharded", "--pass", "misa", "--wrap", "ddp", *options],
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trains_and_exports(done.stdout)


def test_the_command_line_lists_the_passes():
    found = CliRunner().invoke(app, ["list"])
    assert found.exit_code == 0
    for name in (
        "misa",
        "lisa",
        "badam",
        "recompute",
        "chunked_loss",
        "velora",
        "compress",
        "rso",
        "mezo",
    ):
        assert name in found.output


def test_the_command_line_plans_from_a_config_alone(tmp_path):
    transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=128
    ).save_pretrained(tmp_path)
    runner = CliRunner()
    found = runner.invoke(app, ["plan", str(tmp_path), "budget=0.2", "--length", "16"])
    assert found.exit_code == 0, found.output
    assert "optimizer" in found.output and "budget=0.2" in found.output
    refused = runner.invoke(app, ["plan", str(tmp_path), "budget=7"])
    assert refused.exit_code == 2 and "lies in (0, 1]" in refused.output.replace("\n", " ")


@pytest.mark.real
@pytest.mark.filterwarnings("ignore:.*pad_token_id")
def test_a_chat_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    model, tokenizer = smollm2(layers=2)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
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
        chat_sft.main(data, str(tmp_path / "model"), tmp_path / out, **options)
        return capsys.readouterr().out.splitlines()

    whole = train("whole")
    losses = [float(line.split()[-1]) for line in whole[:-1]]
    assert len(losses) == 6 and losses[-1] < losses[0]
    save = surgery.save

    def stop(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(surgery, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        train("parts")
    monkeypatch.setattr(surgery, "save", save)
    assert capsys.readouterr().out.splitlines() + train("parts") == whole
    for name, tensor in load_file(tmp_path / "whole" / "model.safetensors").items():
        assert tensor.equal(load_file(tmp_path / "parts" / "model.safetensors")[name]), name
