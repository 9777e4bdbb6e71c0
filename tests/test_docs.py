"""The docs say what the library says, and build without a warning."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

import passes
import surgery

ROOT = Path(__file__).parent.parent


def blocks(page: str) -> list[str]:
    """Return the Python of a page, block by block."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def run(code: str, small: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a block as it stands, but with the first two layers of its model; return its names."""
    monkeypatch.chdir(small)
    name = '"HuggingFaceTB/SmolLM2-135M-Instruct"'
    assert code.count(name) == 1
    names: dict[str, Any] = {}
    exec(code.replace(name, '"model"'), names)
    return names


def moved(weights: Mapping[str, Tensor], folder: Path) -> set[str]:
    """Return the weights that are not those of the model in a folder."""
    return {
        n for n, p in load_file(folder / "model.safetensors").items() if not p.equal(weights[n])
    }


@pytest.mark.real
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # a file that is opened in passing
@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md", "docs/guides/long_context.md"])
def test_the_first_loop_of_a_page_runs_as_it_stands(page, small, monkeypatch):
    code = next(block for block in blocks(page) if "surgery.apply" in block)
    names = run(code, small, monkeypatch)
    weights = dict(names["model"].named_parameters())
    assert any("mlp" in n or "attn" in n for n in moved(weights, small / "model"))
    if page == "README.md":
        assert not moved(weights, small / "finetuned")


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")  # those of other people's trainers
@pytest.mark.parametrize("trainer", ["transformers", "trl", "lightning_fabric", "accelerate"])
def test_the_blocks_of_other_trainers_run_as_they_stand(trainer, small, monkeypatch):
    pytest.importorskip(trainer)
    found = blocks("docs/trainer.md")
    first, code = found[0], next(block for block in found if f"from {trainer} import" in block)
    if "from_pretrained(name)" not in code and trainer != "trl":  # "as at the top"
        code = first.partition("surgery.apply")[0] + code
    shutil.rmtree(small / "finetuned", ignore_errors=True)
    names = run(code, small, monkeypatch)
    model = names["trainer"].model if "trainer" in names else names["model"]
    weights = dict(model.named_parameters())
    assert any("mlp" in n or "attn" in n for n in moved(weights, small / "model"))
    assert not moved(weights, small / "finetuned")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The docs as HTML."""
    pytest.importorskip("sphinx")
    folder = tmp_path_factory.mktemp("html")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", "docs", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_docs_build(built):
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    made = {str(page.relative_to(built)) for page in built.rglob("*.html")}
    assert {page.replace(".md", ".html") for page in pages} <= made


def public(module) -> dict[str, object]:
    """What a module exports: its imports under their own names, and what it defines."""
    found = {}
    for node in ast.parse(Path(module.__file__).read_text()).body:
        if isinstance(node, ast.ImportFrom):
            found |= {a.asname: getattr(module, a.asname) for a in node.names if a.asname}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = getattr(module, node.name)
    return {name: each for name, each in found.items() if not name.startswith("_")}


@pytest.mark.parametrize("module", ["surgery", "passes", "surgery.passkit", "surgery.testing"])
def test_all_that_is_public_is_on_the_page_of_the_api(module, built):
    from sphinx.util.inventory import InventoryFile

    text = (built / "objects.inv").read_bytes()
    known = InventoryFile.loads(text, uri="")
    kinds = [kind for kind in known.data if kind.startswith("py:")]
    documented = {name for kind in kinds for name in known.data[kind]}
    names = public(importlib.import_module(module))
    if module == "surgery":
        names |= {"TrainerCallback": surgery.TrainerCallback}  # imported when asked for
    assert len(names) > 5
    missing = []
    for name, each in names.items():
        own = f"{getattr(each, '__module__', '')}.{getattr(each, '__qualname__', '')}"
        if (
            not {f"{module}.{name}", f"surgery.{name}", own, getattr(each, "__name__", "")}
            & documented
        ):
            missing.append(name)
    assert not missing


PASSES = sorted((ROOT / "docs" / "passes").glob("*.md"), key=lambda page: page.stem)
ORDER = [
    "When to use it, and when not",
    "Code",
    "Cost",
    "Options",
    "The paper, and what differs",
    "How it works",
]


@pytest.mark.parametrize("page", PASSES, ids=lambda page: page.stem)
def test_the_page_of_a_pass_has_its_parts_in_order_and_its_options(page):
    """Parts of its own may stand between the paper and how it works."""
    from surgery.contract.registry import registered

    text = page.read_text()
    assert [h for h in re.findall(r"^## (.*)", text, re.MULTILINE) if h in ORDER] == ORDER
    options = text.split("\n## Options\n")[1].split("\n## ")[0]
    rows = {
        row[0].strip("`"): row[1] for row in re.findall(r"^\| (`\w+`) \| (.*?) \|", options, re.M)
    }
    surgery.available()
    spec = registered()[page.stem]
    fields = {field.name: field.default for field in dataclasses.fields(spec)}
    shared = (
        {f.name for f in dataclasses.fields(passes.Mezo)} if "mezo.md#options" in options else set()
    )
    assert set(rows) <= set(fields) and set(fields) - shared <= set(rows)
    for name, told in rows.items():
        assert ast.literal_eval(told.strip("`")) == fields[name], name
