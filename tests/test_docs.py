"""The docs say what the library says, and build without a warning."""

from __future__ import annotations

import ast
import importlib.util
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

ROOT = Path(__file__).parent.parent


def texts() -> str:
    """Return all that the library may say, what is filled in left out."""
    found = []
    for folder in ("surgery", "passes"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [v.value if isinstance(v, ast.Constant) else "{}" for v in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def test_what_the_troubleshooting_quotes_is_said():
    page, said = (ROOT / "docs" / "troubleshooting.md").read_text(), texts()
    headings = re.findall(r"^### (.*)", page, re.MULTILINE)
    quoted = [each for line in headings for each in re.findall('"(.*?)"', line)]
    assert len(quoted) > 30
    missing = [q for q in quoted if not re.search(re.escape(q).replace(r"\.\.\.", ".*"), said)]
    assert not missing


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
@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
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


@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="docs are not installed")
def test_the_docs_build(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", "docs", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "troubleshooting.html").is_file()
