"""The command line, as people use it: what is printed, what is written, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from models import make
from processes import ROOT
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

import passes
import surgery
from surgery.cli import app, checking, metrics, stopping
from surgery.cli.comparing import readable
from surgery.cli.given import passes_of
from surgery.cli.rows import UNLEARNED, language_rows, order, places_of

WORDS = "the cat sat on a mat and dog ran up hill user assistant : good bad".split()
CHAT = "{% for m in messages %}{{ m.role }} : {{ m.content }} <e> {% endfor %}"
CHAT += "{% if add_generation_prompt %}assistant : {% endif %}"
TEXT = "the cat sat on a mat and the dog ran up a hill and sat . " * 24
LLAMA = dict(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
)


def run(*words: object, code: int = 0):
    found = CliRunner().invoke(app, [str(word) for word in words])
    assert found.exit_code == code, (found.output, found.exception)
    return found


def refused(*words: object) -> str:
    """Return what a command says of bad input: one line, and nothing on the other stream."""
    found = run(*words, code=2)
    assert found.stdout == "" and found.stderr.count("\n") == 1
    return found.stderr


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: i for i, word in enumerate(["<u>", "<e>", ".", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<u>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<e>", pad_token="<e>", unk_token="<u>"
    )
    found.chat_template = CHAT
    return found


@pytest.fixture(scope="module")
def llama(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT)
    return path


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# -- list, plan, diff, doctor ---------------------------------------------------------------------


def test_list_groups_all_passes_by_what_they_save():
    found = run("list").stdout
    assert all(name in found for name in surgery.available())
    assert found.index("misa") < found.index("recompute")  # what saves most is first
    assert "budget" in run("list", "misa").stdout
    assert "Did you mean 'misa'?" in refused("list", "miza")


@pytest.mark.parametrize("name", surgery.available())
def test_a_pass_saves_what_it_says(name):
    """Beside the plan, which is held against the allocator elsewhere."""
    model = make("llama")
    options = {"misa": {"budget": 0.3}, "rso": {"rank": 4}, "velora": {"groups": 4}}
    options |= {"lisa": {"layers": 1, "targets": ["q_proj"]}, "badam": {}}
    found = surgery.plan(model, (2, 32), name, **options.get(name, {}))
    kinds = ("gradients", "optimizer", "activations")
    less = [kind for kind in kinds if getattr(found.after, kind) < getattr(found.before, kind)]
    assert tuple(less) == vars(passes)[type(passes_of([name])[0]).__name__].saves


def test_plan_takes_several_passes_with_options(llama):
    words = ["--pass", 'misa:budget=0.4,targets=["q_proj","v_proj"],period=7', "--pass", "recompute"]
    found = json.loads(
        run("plan", llama, *words, "--batch", 2, "--length", 16, "--json", "--device", "h100",
            "--optimizer", "sgd:momentum=0.9", "--autocast", "bfloat16", "--clip", 1.0).stdout
    )  # fmt: skip
    said = [value for label, value in found["lines"] if label == "pass"]
    assert "period=7" in said[0] and "targets=['q_proj', 'v_proj']" in said[0]
    assert said[1] == "Recompute()"
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


def test_plan_reads_a_config_file(llama):
    assert "budget=0.4" in run("plan", llama / "config.json", "budget=0.4").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--pass", "miza"], "Did you mean 'misa'?"),
        (["--pass", "misa:budget"], "not of the form name=value"),
        (["--pass", "misa:budged=1"], "misa has no option 'budged'. Did you mean 'budget'?"),
        (["budget=0.1", "--pass", "misa", "--pass", "rso"], "--pass misa:budget=0.1"),
        (["--optimizer", "adamv"], "Did you mean 'adamw'"),
        (["--optimizer", "sgd:momentun=1"], "SGD does not take"),
        (["--device", "h1000"], "device='h1000' is not known"),
        (["--autocast", "int4"], "unknown dtype 'int4'"),
        (["--length", "0"], "(rows, length)"),
    ],
)
def test_bad_words_are_one_line(llama, words, said):
    assert said in refused("plan", llama, *words)


def test_a_model_that_is_nowhere_is_one_line(tmp_path):
    assert "nor an id that the hub answers to" in refused("plan", "no-one/nothing")
    assert "nor a folder with a config.json" in refused("plan", tmp_path)


def test_diff_shows_what_a_pass_puts_in(llama):
    found = run("diff", llama, "--pass", "recompute").stdout
    assert "nodes of recompute" in found
    put_in = [line for line in found.splitlines() if line.startswith("+")]
    assert any(line.endswith("# <- recompute") for line in put_in)
    assert "model.layers.0.mlp.down_proj.weight" in found and "layers.1" not in found
    assert "layers.1" in run("diff", llama, "--pass", "recompute", "--layers", 0).stdout


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


# -- rows -----------------------------------------------------------------------------------------


def rows_of(records, tokenizer, length=64, pack=None, learn="answers"):
    return language_rows(records, tokenizer, length, pack, learn, "text")


def test_only_answers_of_a_chat_are_learned(tokenizer):
    messages = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "and a dog"},
        {"role": "assistant", "content": "ran up"},
    ]
    found = rows_of([{"messages": messages}], tokenizer)
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False)).input_ids
    learned = [i for i in found.rows[0].labels if i != UNLEARNED]
    assert found.rows[0].ids == whole and not found.packed
    assert tokenizer.decode(learned) == "sat <e> ran up <e>"
    every = rows_of([{"messages": messages}], tokenizer, learn="all")
    assert every.rows[0].labels == whole


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    messages = [{"role": r, "content": "cat"} for r in ("user", "assistant") * 2]
    before, tokenizer.chat_template = tokenizer.chat_template, "{{ messages|length }}" + CHAT
    try:
        with pytest.raises(surgery.OptionError, match="record 1: .*--learn all"):
            rows_of([{"messages": messages}], tokenizer)
    finally:
        tokenizer.chat_template = before


def test_completions_are_learned_and_prompts_not(tokenizer):
    found = rows_of([{"prompt": "the cat", "completion": "sat"}], tokenizer)
    the, cat, sat, end = tokenizer("the cat sat <e>").input_ids
    assert found.rows[0].ids == [the, cat, sat, end]
    assert found.rows[0].labels == [UNLEARNED, UNLEARNED, sat, end]


def test_packing_loses_nothing_but_the_end(tokenizer):
    records = [{"text": "the cat sat"}, {"text": "on a mat and ran"}]
    found = rows_of(records, tokenizer, length=4)
    joined = tokenizer("the cat sat <e> on a mat and ran <e>").input_ids
    assert [i for row in found.rows for i in row.ids] == joined[:8]
    assert found.packed and set(found.batch([0, 1])) == {"input_ids", "labels"}


def test_batches_are_padded_and_masked(tokenizer):
    found = rows_of([{"text": "the cat"}, {"text": "the cat sat on"}], tokenizer, pack=False)
    batch = found.batch([0, 1])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"][0, 3:].tolist() == [UNLEARNED] * 2
    assert found.learned(batch) == 2 + 4


def test_every_epoch_visits_every_row_once():
    seen = [p for step in range(10) for b in places_of(step, 2, 3, 20, 5) for p in b]
    assert sorted(seen[:20]) == sorted(seen[20:40]) == list(range(20))
    assert seen[:20] == order(20, 5, 0) != seen[20:40]


# -- train, export --------------------------------------------------------------------------------

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
    tokens = transformers.AutoTokenizer.from_pretrained(llama)
    rows = rows_of([{"text": text.read_text()}], tokens, length=16)
    held = rows.batch(order(len(rows.rows), 3, -1)[:2])
    assert trained(**held).loss.item() == pytest.approx(checks[1], abs=1e-5)
    run("export", tmp_path, tmp_path / "again")
    again, once = weights_of(tmp_path / "again"), weights_of(tmp_path / "model")
    assert again.keys() == once.keys() and all(torch.equal(again[n], once[n]) for n in once)


def test_exact_passes_train_as_a_plain_loop(llama, text, tmp_path):
    run("train", llama, "--data", text, "--out", tmp_path, *SHORT, "--held-out", 0)
    tokens = transformers.AutoTokenizer.from_pretrained(llama)
    plain = transformers.AutoModelForCausalLM.from_pretrained(llama).train()
    rows = rows_of([{"text": text.read_text()}], tokens, length=16)
    mixed = [rows.rows[i] for i in order(len(rows.rows), 3, -1)]
    optimizer = torch.optim.AdamW(plain.parameters())
    factors = [1 / 3, 2 / 3] + [0.5 * (1 + torch.pi and (1 + _cos(i / 4)) / 1) for i in range(4)]
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
    run("train", llama, *options, "--batch", 1, "--accumulate", 4, "--out", tmp_path / "four")
    one, four = (weights_of(tmp_path / name / "model") for name in ("one", "four"))
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-4, atol=1e-6)


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


def test_stopped_runs_go_on_to_the_bit(tokenizer, text, tmp_path):
    """In a process of its own, which SIGTERM ends; its screen holds what is ours."""
    config = transformers.GPT2Config(  # has dropout
        vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=64
    )
    config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
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
    known = ("rows", "step", "no loss.png")
    assert [line for line in said.splitlines() if not line.strip().startswith(known) and "rows," not in line] == []
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


def test_the_first_signal_is_noted_and_the_second_acts():
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
        ("a.jsonl", '{"text": "cat"}\n{"tex', [], "a.jsonl, line 2, is no JSON"),
        ("a.jsonl", '["cat"]', [], "is no object"),
        ("a.jsonl", '{"content": "cat"}', [], "record 1 has no 'text'; its columns: content"),
        ("a.csv", "a,b\nc,d\n", ["--task", "classify"], "has no 'label'"),
        ("a.txt", TEXT, ["--task", "clasify"], "Did you mean 'classify'?"),
        ("a.txt", TEXT, ["--dtype", "float16"], "Use bfloat16"),
        ("a.txt", TEXT, ["--device", "cuda:77"], "--device cuda:77 cannot be used"),
        ("a.txt", TEXT, ["--batch", 0], "--batch 0 is less than 1"),
        ("a.txt", TEXT, ["--length", 16, "--held-out", 999], "leaves none to learn from"),
        ("a.txt", TEXT, ["--pass", "misa:budget=7"], "lies in (0, 1]"),
        ("a.txt", TEXT, ["--tokenizer", "nowhere"], "no tokenizer in 'nowhere'"),
    ],
)
def test_train_refuses_bad_input_in_one_line(llama, tmp_path, name, content, words, said):
    if content is not None:
        (tmp_path / name).write_text(content)
    found = refused("train", llama, "--data", tmp_path / name, "--out", tmp_path / "out", *words)
    assert said in found
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_export_of_what_is_no_run_is_refused(tmp_path):
    assert "CheckpointError" in refused("export", tmp_path, tmp_path / "out")
