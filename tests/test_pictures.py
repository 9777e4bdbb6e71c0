"""Pictures: drawn without a display, and the error of an installation that cannot draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from models import inputs_of, make

import passes
import surgery
from surgery.prediction.loop import Loop, foresee
from surgery.reports import pictures

LOOP = Loop(loss=lambda model, batch: model(batch["tokens"], batch["tokens"]))


@dataclass(frozen=True)
class Row:
    spec: Any
    peak: int | None
    milliseconds: float | None


def steps():
    model, batch = make("plain"), inputs_of("plain")
    return {
        "before": foresee(model, batch, (), LOOP),
        "after": foresee(model, batch, [passes.Misa(budget=0.5)], LOOP),
    }


ROWS = [
    Row(None, 10**9, 100.0),
    Row("recompute", 8 * 10**8, 110.0),
    Row(["misa", passes.Recompute()], 3 * 10**8, 120.0),
    Row("compress", 9 * 10**8, 130.0),
    Row("mezo", None, None),
]
ROUNDS = [{"layers.10.up.weight"}, {"layers.9.up.weight", "head.weight"}, set()]
DRAWN = {
    "memory": lambda target: pictures.memory(steps(), target),
    "bytes against time": lambda target: pictures.bytes_against_time(ROWS, target),
    "modules": lambda target: pictures.modules_over_rounds(ROUNDS, target),
    "loss": lambda target: pictures.loss({"misa": [3.0, 2.5], "plain": [3.0, 2.4]}, target),
}


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    pytest.importorskip("matplotlib")
    made = []
    plain = pictures._figure

    def figure(*size):
        made.append(plain(*size))
        return made[-1]

    monkeypatch.setattr(pictures, "_figure", figure)
    return made


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("name", DRAWN)
def test_each_is_drawn_into_a_file(name, suffix, tmp_path, figures):
    DRAWN[name](tmp_path / f"picture{suffix}")
    (written,) = tmp_path.iterdir()  # no partial one is left
    head = {".png": b"\x89PNG", ".svg": b"<?xml"}[suffix]
    assert written.name == f"picture{suffix}" and written.read_bytes().startswith(head)


def test_the_course_of_memory_reaches_the_peak_and_names_its_phases(tmp_path, figures):
    drawn = steps()
    pictures.memory(drawn, tmp_path / "memory.png")
    for axes, step in zip(figures[0].axes, drawn.values(), strict=True):
        top = max(max(p.vertices[:, 1]) for area in axes.collections for p in area.get_paths())
        assert top == pytest.approx(step.peak / 1e9)
        told = [text.get_text() for text in axes.texts]
        assert told == ["forward", "backward", "step"]
    before, after = (max(sum(held.values()) for _, held in s.course) for s in drawn.values())
    assert after < before


def test_what_is_neither_faster_nor_smaller_stands_back(tmp_path, figures):
    pictures.bytes_against_time(ROWS, tmp_path / "rows.png")
    (axes,) = figures[0].axes
    named = axes.get_legend().get_texts()
    assert {text.get_text(): text.get_fontweight() for text in named} == {
        "1  plain": "bold",
        "2  recompute": "bold",
        "3  misa + recompute": "bold",
        "4  compress": "normal",
    }
    assert [text.get_text() for text in axes.texts] == ["1", "2", "3", "4"]


def test_what_fit_has_found_goes_by_its_titles(tmp_path, figures):
    fit = surgery.fit(make("llama"), (1, 8), "1GiB", device="h100")
    pictures.bytes_against_time(fit.rows, tmp_path / "rows.png")
    named = figures[0].axes[0].get_legend().get_texts()
    told = {text.get_text().partition("  ")[2] for text in named}
    assert {"as it is", "gradient checkpointing", "recompute"} < told


def test_a_measured_peak_is_a_line_and_in_the_title(tmp_path, figures):
    pictures.memory(steps(), tmp_path / "memory.png", {"after": 2 * 10**9})
    before, after = figures[0].axes
    assert after.lines[0].get_ydata()[0] == 2 and "measured: 2 GB" in after.get_title()
    assert "measured" not in before.get_title()


def test_modules_stand_in_the_order_of_blocks(tmp_path, figures):
    pictures.modules_over_rounds(ROUNDS, tmp_path / "rounds.png")
    (axes,) = figures[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "head.weight  33%",
        "layers.9.up.weight  33%",
        "layers.10.up.weight  33%",
    ]
    assert axes.images[0].get_array().tolist() == [[0, 1, 0], [0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize(
    "draw",
    [
        lambda target: pictures.memory({}, target),
        lambda target: pictures.bytes_against_time(ROWS[-1:], target),
        lambda target: pictures.modules_over_rounds([set()], target),
        lambda target: pictures.loss({"misa": []}, target),
    ],
)
def test_nothing_to_draw_is_an_error(draw, tmp_path):
    with pytest.raises(surgery.OptionError, match="nothing to draw"):
        draw(tmp_path / "picture.png")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", DRAWN)
def test_without_matplotlib_the_error_names_the_extra(name, tmp_path, monkeypatch):
    def missing(module, *args):
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr(pictures, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "model-surgery\[plots\]"'):
        DRAWN[name](tmp_path / "picture.png")
