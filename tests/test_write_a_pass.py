"""The three passes of docs/write_a_pass.md, as a package with an entry point, through the laws."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import inputs_of, loss_of, make

import passes
import surgery
import surgery.testing
from surgery import catalogue
from surgery.contract.registry import _PASSES

PAGE = (Path(__file__).parent.parent / "docs" / "write_a_pass.md").read_text()
FILES = dict(re.findall(r"```\w+\n# ([\w./]+)\n(.*?)```", PAGE, re.S))
METADATA = "Metadata-Version: 2.1\nName: outside-passes\nVersion: 1.0\n"
NAMES = ("by_norm", "input_noise", "columns")


def build(folder: Path) -> Path:
    """Write the page's package, and what an installer would write beside it."""
    for name, code in FILES.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
    about = folder / "outside_passes-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(METADATA)
    (entry,) = re.findall(r'^\[project.entry-points."(.*)"\]$\n^(.*) = "(.*)"$', PAGE, re.M)
    (about / "entry_points.txt").write_text(f"[{entry[0]}]\n{entry[1]} = {entry[2]}\n")
    return folder


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    folder = build(tmp_path_factory.mktemp("site"))
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    catalogue._load_others.cache_clear()
    yield importlib.import_module("test_outside_passes")
    sys.path.remove(str(folder))
    catalogue._load_others.cache_clear()
    for name in NAMES:
        _PASSES.pop(name, None)
    for name in [n for n in sys.modules if "outside_passes" in n]:
        del sys.modules[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("law", surgery.testing.LAWS)
def test_laws(outside, law, name):
    outside.test_laws(law, name)


def test_two_processes(outside, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    surgery.testing.two_ranks([outside.CASES[name] for name in NAMES])


def test_the_entry_point_makes_them_known(tmp_path):
    build(tmp_path)
    script = (
        "import sys, surgery\n"
        "assert 'outside_passes' not in sys.modules\n"
        "surgery.apply(surgery.testing.tiny(), 'misa', budget=0.5)\n"
        "assert 'outside_passes' not in sys.modules, 'loaded for a pass of ours'\n"
        "surgery.apply(surgery.testing.tiny(), 'columns', count=4)\n"
        "assert {'by_norm', 'columns', 'input_noise'} <= set(surgery.available())\n"
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import surgery.testing\n" + script],
        check=True,
        env={"PYTHONPATH": ":".join([str(tmp_path), *sys.path]), "PATH": ""},
    )


COMPANY = {
    "misa": lambda: [passes.Misa(budget=0.3, period=2)],
    "rso": lambda: [passes.Rso(rank=4, period=2)],
    "recompute": lambda: [passes.Recompute()],
    "all": lambda: [
        passes.Misa(budget=0.5, period=2),
        passes.Rso(rank=4, period=3),
        passes.Recompute(),
        passes.ChunkedLoss(),
    ],
}


@pytest.mark.parametrize(
    ("company", "family", "checkpointed"),
    [(company, "plain", False) for company in COMPANY]
    + [("rso", "llama", True), ("all", "llama", True)],
)
def test_noise_on_inputs_composes(outside, company, family, checkpointed):
    """The noise of nothing: the run is that of the others alone, to rounding."""
    noise = outside.outside_passes.InputNoise
    losses: dict[float | None, list[float]] = {}
    for sigma in (None, 0.0, 0.1):
        model = make(family)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        more = [] if sigma is None else [noise(sigma=sigma)]
        surgery.apply(model, [*COMPANY[company](), *more])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses[sigma] = []
        for seed in range(4):
            loss = loss_of(model, inputs_of(family, seed=seed))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[sigma].append(loss.item())
    assert losses[0.0] == pytest.approx(losses[None], rel=1e-5)
    assert losses[0.1] != pytest.approx(losses[None], rel=1e-5)


def test_recompute_may_run_the_noise_again(outside):
    """The node is cheap: what it makes is not kept, and drawn the same in backward."""
    from surgery.memory import measure

    noise, live, grads = outside.outside_passes.InputNoise, [], []
    for spec in ([noise()], [noise(), passes.Recompute()]):
        model = surgery.apply(make("llama"), spec)
        inputs = inputs_of("llama", rows=4, length=64)
        loss_of(model, inputs).backward()
        grads.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
        model.zero_grad()
        live.append(measure(lambda m=model, i=inputs: loss_of(m, i), torch.device("cpu")).live)
    assert live[1] < 0.85 * live[0]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-7)
