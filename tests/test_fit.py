"""`fit` plays what is sensible, recommends what fits, and says so where nothing does."""

from __future__ import annotations

import pytest
import torch
from laws import state_of
from models import inputs_of, make

import surgery
from surgery.memory import storage_bytes
from surgery.testing.models import Tiny, tokens


def small():
    """A model whose logits weigh most."""
    torch.manual_seed(0)
    return Tiny(width=32)


BATCH = tokens(rows=64)


@pytest.fixture(scope="module")
def found():
    return surgery.fit(small(), BATCH, "1GB", device="h100")


def test_exact_passes_come_first_and_the_fastest_that_fits_is_recommended(found):
    assert any(row.peak for row in found.rows if "badam" in row.spec)
    exact = [row for row in found.rows if row.quality == "the same gradients" and row.fits]
    assert found.best in exact
    assert found.best.milliseconds == min(row.milliseconds for row in exact)
    assert "Recommended" in str(found) and found.best.title in str(found)
    assert found.nearest.peak == min(row.peak for row in found.rows if row.peak)
    assert all(row.rows >= 64 and row.length >= 6 for row in found.rows if row.fits)


def test_another_memory_is_judged_without_playing_again(found, monkeypatch):
    again = surgery.fit(small(), BATCH, "2MiB", device="h100")
    monkeypatch.setattr("surgery.reports.fitting.foresee", None)
    within = found.within("2MiB")
    assert (within.rows, within.best, within.nearest) == (again.rows, again.best, again.nearest)
    assert within.title == again.title and within.best != found.best


def test_what_fits_is_what_is_applied_and_the_peak_is_real():
    peaks = {row.title: row.peak for row in surgery.fit(small(), BATCH, "1GB").rows if row.peak}
    room = int((peaks["as it is"] + min(peaks.values())) / 2 / 0.9)
    model = surgery.apply(small(), "auto", batch=BATCH, memory=room, compile=False)
    chosen = surgery.fit(small(), BATCH, room)
    assert chosen.best is not None and chosen.best.title != "as it is"
    assert chosen.best.peak <= 0.9 * room and not chosen.rows[0].fits
    decision = state_of(model).decision
    assert [p.name for p in decision.passes] == [*chosen.best.spec] and decision.compile is False
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step():
        model(**BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    state = [v for s in optimizer.state.values() for v in s.values()]
    held = storage_bytes([*model.parameters(), *model.buffers(), *BATCH.values(), *state])
    peak = held + surgery.memory.measure(step, torch.device("cpu")).peak
    assert chosen.best.peak == pytest.approx(peak, rel=0.01)


def test_report_says_how_far_the_prediction_was_right():
    weights = storage_bytes(small().parameters())
    found = surgery.fit(small(), BATCH, 40 * weights)
    least = found.within(int(1.2 * (found.nearest.peak or 0)))
    assert least.best is not None and least.best.spec
    model = least.apply(small(), compile=False)
    said = dict(surgery.report(model, BATCH).lines)
    assert said["peak"].endswith("predicted") and "off by" not in said["activations"]
    assert "measured" in said["activations"]
    other = dict(surgery.report(model, tokens(rows=128)).lines)
    assert "is not the one that was played" in other["activations"]
    assert "activations" not in dict(surgery.report(model).lines)


def test_where_nothing_fits_the_nearest_is_named():
    weights = storage_bytes(small().parameters())
    found = surgery.fit(small(), BATCH, weights + 4096)
    assert found.best is None and "Nothing fits; the nearest is" in str(found)
    with pytest.raises(surgery.ModelError, match=r"nothing fits into .* The nearest is"):
        found.apply(small())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"memory": "24 gallons"}, "is no number of bytes"),
        ({"memory": "1.2.3GB"}, "is no number of bytes"),
        ({}, "say how much memory there is"),
        ({"memory": 1000}, "the weights of this LlamaForCausalLM alone are"),
        ({"memory": "1GB", "device": "h1000"}, "Did you mean 'h100'"),
        ({"memory": "1GB", "goal": "half"}, "goal='half' must be one of"),
    ],
)
def test_bad_input(options, said):
    with pytest.raises(surgery.OptionError, match=said):
        surgery.fit(make("llama"), inputs_of("llama"), **options)


def test_a_backend_without_a_graph_is_refused():
    with pytest.raises(surgery.OptionError, match=r"no graph for backend='inductor'"):
        surgery.apply(small(), "auto", batch=BATCH, memory="1GB", backend="inductor")


def test_auto_needs_a_batch():
    with pytest.raises(surgery.OptionError, match="batch=batch"):
        surgery.apply(make("llama"), "auto", memory="1GB")


@pytest.mark.parametrize(("goal", "name"), [("forwards", "mezo"), ("adapter", "recompute")])
def test_other_goals(goal, name):
    found = surgery.fit(small(), BATCH, "1GB", goal=goal)
    assert any(name in row.spec for row in found.rows) and found.best is not None
