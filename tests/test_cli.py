"""The command line: list, plan, diff and doctor, and what all commands have in common."""

from __future__ import annotations

import json
from dataclasses import fields

import commands
import pytest
import torch
import transformers
from commands import LLAMA, refused, run
from laws import ADAPTED
from models import adapt, make
from typer.testing import CliRunner

import passes
import surgery
from surgery.cli import app, checking
from surgery.cli.comparing import readable
from surgery.cli.listing import explained
from surgery.contract.registry import registered
from surgery.reports import predicted


@pytest.fixture
def llama():
    return commands.llama()


def test_list_groups_all_passes_by_what_they_save():
    found = run("list").stdout
    assert all(name in found for name in surgery.available())
    assert found.index("misa") < found.index("recompute")  # what saves most is first
    assert "budget" in run("list", "misa").stdout
    assert "size of the perturbation" in " ".join(run("list", "mezo").stdout.split())
    assert "Did you mean 'misa'" in refused("list", "miza")


@pytest.mark.parametrize("name", surgery.available())
def test_list_says_what_each_option_is(name):
    kind = registered()[name]
    assert {field.name for field in fields(kind)} <= {n for n, t in explained(kind).items() if t}


@pytest.mark.parametrize("name", surgery.available())
def test_a_pass_saves_what_it_says(name):
    """Of gradients and optimizer; that activations fall is each pass's own test."""
    options = {"misa": {"budget": 0.3}, "rso": {"rank": 4}, "velora": {"groups": 4}}
    options |= {"galore": {"rank": 4}}
    options |= {"lisa": {"layers": 1, "targets": ["q_proj"]}}
    options |= {"trim": {"used": [3, 4]}}
    model = make("llama", num_hidden_layers=3)
    model = adapt(model, "lora") if name in ADAPTED else model
    found = surgery.plan(model, None, name, **options.get(name, {}))
    kinds = ("gradients", "optimizer")
    less = {kind for kind in kinds if getattr(found.after, kind) < getattr(found.before, kind)}
    assert less == set(registered()[name].saves) - {"activations"}


def test_plan_takes_several_passes_with_options(llama):
    words = [
        "--pass",
        'misa:budget=0.4,targets=["q_proj","v_proj"],period=7',
        "--pass",
        "recompute",
    ]
    found = json.loads(
        run("plan", llama, *words, "--batch", 2, "--length", 16, "--json", "--device", "h100",
            "--optimizer", "sgd:momentum=0.9", "--autocast", "bfloat16", "--clip", 1.0).stdout
    )  # fmt: skip
    said = [value for label, value in found["lines"] if label == "pass"]
    assert "period=7" in said[0] and "targets=['q_proj', 'v_proj']" in said[0]
    assert said[1] == "recompute"
    assert found["after"]["milliseconds"] > 0 and found["holders"]
    plain = surgery.plan(
        llama,
        (2, 16),
        [passes.Misa(budget=0.4, targets=["q_proj", "v_proj"], period=7), passes.Recompute()],
        device="h100",
        optimizer=lambda p: torch.optim.SGD(p, momentum=0.9),
        autocast=torch.bfloat16,
        clip=1.0,
    )
    assert found["after"]["peak"] == plain.after.peak


def test_fit_recommends_and_refuses(llama):
    words = ["fit", llama, "--goal", "forwards", "--batch", 2, "--length", 16]
    found = json.loads(run(*words, "--memory", "1GB", "--json").stdout)
    assert found["best"]["lines"].startswith("surgery.apply(model, [")
    assert found["best"]["peak"] <= 0.9e9 and len(found["rows"]) == 4
    assert "--memory 24GiB, or --device rtx4090" in refused(*words)
    assert "is not a number of bytes" in refused(*words, "--memory", "24 gallons")
    assert "goal='half' must be one of" in refused(*words[:2], "--memory", "1GB", "--goal", "half")


def test_plan_reads_a_config_file(llama):
    assert "budget=0.4" in run("plan", llama / "config.json", "budget=0.4").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--pass", "miza"], "Did you mean 'misa'"),
        (["--pass", "misa:budget"], "not of the form name=value"),
        (["--pass", "misa:budged=1"], "misa has no option 'budged'. Did you mean 'budget'?"),
        (["budget=0.1", "--pass", "misa", "--pass", "rso"], "--pass misa:budget=0.1"),
        (["--optimizer", "adamv"], "Did you mean 'adam'"),
        (["--optimizer", "sgd:momentun=1"], "SGD does not take"),
        (["--device", "h1000", "budget=0.5"], "device='h1000' is not known"),
        (["--autocast", "int4"], "unknown dtype 'int4'"),
        (["--length", "0", "budget=0.5"], "(rows, length)"),
        (["--clip", "-1", "budget=0.5"], "must be a positive norm"),
        (["--optimizer", "muon", "budget=0.5"], "the optimizer does not take the"),
    ],
)
def test_bad_words_are_one_line(llama, words, said):
    assert said in refused("plan", llama, *words)


def test_a_model_that_is_nowhere_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "nor the id of a model on the hub" in refused("plan", "no-one/nothing")
    assert "nor a folder with a config.json" in refused("plan", tmp_path)


def test_a_config_of_another_kind_is_one_line(tmp_path):
    transformers.ViTConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    assert "a ViTConfig is not the config of a causal language model" in refused("plan", tmp_path)


def test_a_plan_without_a_peak_ends_with_2_and_tells_the_rest(llama, monkeypatch):
    def unplayable(*args: object) -> None:
        raise RuntimeError("shapes are data")

    monkeypatch.setattr(predicted, "foresee", unplayable)
    found = json.loads(run("plan", llama, "budget=0.5", "--json", code=2).stdout)
    assert found["after"]["peak"] is None and found["after"]["parameters"]
    assert "RuntimeError: shapes are data" in dict(found["lines"])["peak not predicted"]


def test_diff_shows_what_a_pass_puts_in(tmp_path):
    transformers.LlamaConfig(**LLAMA | {"num_hidden_layers": 2}).save_pretrained(tmp_path)
    found = run("diff", tmp_path, "--pass", "recompute").stdout
    assert "nodes of recompute" in found
    put_in = [line for line in found.splitlines() if line.startswith("+")]
    assert any(line.endswith("# <- recompute") for line in put_in)
    assert "model.layers.0.mlp.down_proj.weight" in found and "layers.1" not in found
    assert "layers.1" in run("diff", tmp_path, "--pass", "recompute", "--layers", 0).stdout


def test_code_is_readable():
    name = "l_self_modules_model_modules_layers_modules_0_modules_q_proj_parameters_weight_"
    assert readable(f"    x = f({name});  {name} = y = None") == (
        "    x = f(model.layers.0.q_proj.weight)"
    )


def test_doctor_finds_the_namesake_and_versions_that_do_not_fit(monkeypatch):
    assert torch.__version__ in run("doctor").stdout
    here = checking.installed
    monkeypatch.setattr(checking, "installed", lambda n: "9.9" if n == "surgery" else here(n))
    assert "pip uninstall surgery" in run("doctor", code=1).stdout
    monkeypatch.setattr(checking, "installed", lambda n: "1.13" if n == "torch" else here(n))
    assert "torch 1.13 was not tested" in run("doctor", code=1).stdout


@pytest.mark.parametrize(
    ("version", "range", "fits"),
    [
        ("2.11.0", ">=2.11,<2.16", True),
        ("2.13.0+cpu", ">=2.11,<2.16", True),
        ("2.16.0", "<2.16,>=2.11", False),
        ("2.9.1", ">=2.11,<2.16", False),
        ("5.17.0", "", True),
    ],
)
def test_versions_are_compared_as_versions(version, range, fits):
    assert checking.fits(version, range) is fits


def test_colours_come_and_go(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[31m" in refused("list", "miza")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[31m" not in refused("list", "miza")


def test_shells_can_complete():
    assert "--install-completion" in run("--help").stdout


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
