"""What the base package promises works with the base package's dependencies alone."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distribution, packages_distributions, requires

from packaging.requirements import Requirement

BASE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {refused!r}:
            return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
sys.path.insert(0, {root!r})
"""

QUICK_START = """
import tempfile
import torch
from torch import nn
import passes
import surgery

model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8))
surgery.apply(model, [passes.Misa(budget=0.4, period=2), passes.Recompute()])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(5):
    x = torch.randn(16, 8)
    (model(x) - x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
print(surgery.report(model))
with tempfile.TemporaryDirectory() as folder:
    surgery.save(model, folder + "/run", optimizer)
    surgery.load(model, folder + "/run", optimizer)
    surgery.export(model, folder + "/out")
    print(surgery.saved_passes(folder + "/run"))
surgery.remove(model)
for name in sorted({*surgery.available()} - {"flat_lora", "trim", "sherl"}):  # PEFT, words, blocks
    options = {"misa": {"budget": 0.5}, "rso": {"rank": 4}, "subzero": {"rank": 4}}
    options = options | {"velora": {"groups": 4}, "lisa": {"layers": 1}, "galore": {"rank": 4}}
    options = options.get(name, {})
    print(surgery.plan(model, None, name, **options).title)
    surgery.remove(surgery.apply(model, name, **options))
print("works")
"""


def closure() -> set[str]:
    """Distributions that the base package brings with it."""
    found: set[str] = set()
    waiting = ["model-surgery"]
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            wanted = [Requirement(line) for line in requires(name) or ()]
        except Exception:  # not installed here: a marker of another platform
            continue
        waiting += [w.name for w in wanted if not w.marker or w.marker.evaluate({"extra": ""})]
    return found


def refused() -> set[str]:
    """Top-level names of what is installed besides."""
    base = closure()
    return {
        name
        for name, owners in packages_distributions().items()
        if not any(owner.lower().replace("_", "-") in base for owner in owners)
    }


def run(code: str, root: str) -> subprocess.CompletedProcess:
    script = BASE.format(refused=refused(), root=root) + code
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True
    )


def test_the_quick_start_needs_the_base_dependencies_only(pytestconfig):
    assert {"transformers", "peft", "accelerate"} <= refused()
    done = run(QUICK_START, str(pytestconfig.rootpath))
    assert done.stdout.strip().endswith("works"), done.stderr


def test_what_needs_more_says_so_in_one_line(pytestconfig):
    for code in (
        "from surgery.cli import main\nimport sys\nsys.argv = ['surgery', 'plan', 'a/b']\nmain()",
        "import surgery\nsurgery.TrainerCallback",
    ):
        done = run(code, str(pytestconfig.rootpath))
        said = done.stderr + done.stdout
        assert done.returncode == (2 if "main" in code else 1)
        assert 'pip install "model-surgery[hf]"' in said.replace("\n", " "), said
        assert "main" not in code or "Traceback" not in said


def test_naming_targets_on_a_plain_model_loads_no_other_package(pytestconfig):
    """Rules are ours; PEFT's stay the tests' reference. It took 4 s instead of 10 ms."""
    code = """
import sys, passes, surgery
from torch import nn
mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
surgery.apply(mlp, passes.Misa(budget=0.9, targets=["0"]))
loaded = {name.partition(".")[0] for name in sys.modules}
print(sorted({"peft", "transformers", "accelerate"} & loaded))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        cwd=pytestconfig.rootpath,
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_the_version_is_the_distributions():
    import surgery

    assert distribution("model-surgery").version == surgery.__version__


if __name__ == "__main__":  # for `make wheel`, which runs it in an empty environment
    print(QUICK_START)
