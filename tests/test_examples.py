"""The README's main job and the command line, as a user runs them, on the real model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from safetensors import safe_open
from typer.testing import CliRunner

from surgery.cli import app

ROOT = Path(__file__).parent.parent
TWO = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]  # processes


def run(command: list[str]) -> str:
    """Run an example with its arguments; return what it prints."""
    example, *arguments = command
    return python(["-m", f"examples.{example}", *arguments])


def python(arguments: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "120", "KINETO_LOG_LEVEL": "99"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.real
@pytest.mark.parametrize(
    "method",
    ["misa,recompute,chunked_loss,compress", "velora"],
)
def test_finetune_smollm2_on_the_kjv(method, tmp_path):
    command = ["finetune", "--layers", "2", "--steps", "8"]
    command += ["--period", "3", "--length", "64", "--pass", method, "--out", str(tmp_path)]
    output = run(command)
    losses = re.search(r"held-out loss ([\d.]+) -> ([\d.]+)", output)
    assert losses and float(losses[2]) < float(losses[1])
    totals = re.search(r"total\D+([\d.,]+) MB\D+([\d.,]+) MB", output)
    assert totals and float(totals[2].replace(",", "")) < float(totals[1].replace(",", ""))
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.num_hidden_layers == 2


@pytest.mark.real
def test_forwards_alone(tmp_path):
    command = ["forwards_only", "--pass", "lozo", "--layers", "2"]
    command += ["--steps", "12", "--length", "32", "--out", str(tmp_path)]
    output = run(command)
    losses = re.search(r"held-out loss ([\d.]+) -> ([\d.]+)", output)
    assert losses and float(losses[2]) < float(losses[1])
    with safe_open(tmp_path / "journal.safetensors", "pt") as file:
        assert file.get_tensor("journal").shape == (12, 5)


@pytest.mark.real
@pytest.mark.parametrize(
    ("example", "more"),
    [("trainer", ["--pass", "rso"]), ("adapters", [])],
)
def test_integrations(example, more, tmp_path):
    command = [example, *more, "--layers", "2", "--steps", "6"]
    command += ["--length", "32", "--out", str(tmp_path)]
    output = run(command)
    losses = re.search(r"held-out loss ([\d.]+) -> ([\d.]+), .* ([\d.]+)", output)
    assert losses and float(losses[2]) < float(losses[1])
    assert losses[3] == losses[2]


@pytest.mark.real
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "examples.sft"],
        ["-m", "examples.fabric", "--pass", "rso"],
        ["-m", "examples.accelerated"],
        [*TWO, "examples.sharded"],
        [*TWO, "examples.sharded", "--pass", "misa", "--wrap", "ddp"],
    ],
    ids=["sft", "fabric", "accelerate", "fsdp2", "ddp"],
)
def test_other_loops(command, tmp_path):
    options = ["--layers", "2", "--steps", "8", "--length", "32", "--out", str(tmp_path)]
    output = python([*command, *options])
    losses = re.search(r"held-out loss ([\d.]+) -> ([\d.]+); plain checkpoint: (\S+)", output)
    assert losses and float(losses[2]) < float(losses[1])
    _, info = transformers.AutoModelForCausalLM.from_pretrained(losses[3], output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


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
