"""The docs say what the library says, and build without a warning."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.real
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # a file that is opened in passing
@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_first_loop_of_a_page_runs_as_it_stands(page, tmp_path, monkeypatch):
    from examples.real import kjv, smollm2

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    code = next(block for block in blocks if "surgery.apply" in block)
    model, tokenizer = smollm2(layers=2)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "notes.txt").write_text(kjv()[:20_000])
    monkeypatch.chdir(tmp_path)
    name = '"HuggingFaceTB/SmolLM2-135M-Instruct"'
    assert code.count(name) == 1
    names: dict[str, object] = {}
    exec(code.replace(name, '"model"'), names)
    weights = dict(names["model"].named_parameters())
    moved = [n for n, p in model.named_parameters() if not p.equal(weights[n])]
    assert any("mlp" in n or "attn" in n for n in moved)
    if page == "README.md":
        assert (tmp_path / "finetuned" / "model.safetensors").is_file()


@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="docs are not installed")
def test_the_docs_build(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", "docs", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "troubleshooting.html").is_file()
