"""`fit` plays what is sensible, recommends what fits, and says so where nothing does."""

from __future__ import annotations

import pytest
import torch
from laws import state_of
from models import batch, inputs_of, layers, make

import surgery
from surgery.memory import storage_bytes
from surgery.reports import fitting
from surgery.reports.compositions import Composition
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
    assert found.best.title in str(found) and "leaves 10% of the memory free" in str(found)
    *_, line = str(found).splitlines()  # to paste: not indented
    assert line.rstrip() == found.best.lines
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
    assert "is not the simulated one" in other["activations"]
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
        ({"memory": "24 gallons"}, "is not a number of bytes"),
        ({"memory": "1.2.3GB"}, "is not a number of bytes"),
        ({}, "say how much memory there is"),
        ({"memory": 1000}, "the weights of this LlamaForCausalLM alone are"),
        ({"memory": "1GB", "device": "h1000"}, "Did you mean 'h100'"),
        ({"memory": "1GB", "goal": "half"}, "goal='half' must be one of"),
        ({"memory": "1GB", "clip": -1.0}, r"clip=-1\.0 must be a positive norm"),
        ({"memory": "1GB", "autocast": "bf16"}, "autocast='bf16' is not a dtype"),
        ({"memory": "1GB", "optimizer": "adamw"}, "must be a callable that makes one"),
        ({"memory": "1GB", "device": torch.device("cpu")}, "is not a name like 'h100'"),
    ],
)
def test_bad_input(options, said):
    with pytest.raises(surgery.OptionError, match=said):
        surgery.fit(make("llama"), inputs_of("llama"), **options)


def test_a_backend_without_a_graph_is_refused():
    with pytest.raises(surgery.OptionError, match=r"no graph for backend='inductor'"):
        surgery.apply(small(), "auto", batch=BATCH, memory="1GB", backend="inductor")


def test_a_batch_without_labels_is_refused_unless_the_loop_has_a_loss():
    ids = {"input_ids": inputs_of("llama")["input_ids"]}
    for call in (surgery.fit, surgery.plan):
        with pytest.raises(surgery.OptionError, match="the batch has no labels"):
            call(make("llama"), ids, "1GB" if call is surgery.fit else "recompute")
    found = surgery.plan(
        make("llama"), ids, "recompute", loss=lambda model, batch: model(**batch).logits.mean()
    )
    assert found.after.peak


def test_a_batch_that_is_none_is_named_by_its_type():
    with pytest.raises(surgery.OptionError, match="batch=a Tensor is neither"):
        surgery.fit(make("llama"), torch.ones(64, 64), "1GB")


def test_small_sizes_are_told_in_mebibytes():
    with pytest.raises(
        surgery.OptionError, match=r"alone are 0\.\d\d MiB, but memory= is 0\.00 MiB"
    ):
        surgery.fit(make("llama"), (1, 8), 1000)


def test_auto_names_a_misspelt_option():
    with pytest.raises(surgery.OptionError, match="Did you mean 'memory'"):
        surgery.apply(small(), "auto", batch=BATCH, memry="1GB")


def test_auto_needs_a_batch():
    with pytest.raises(surgery.OptionError, match="batch=batch"):
        surgery.apply(make("llama"), "auto", memory="1GB")


@pytest.mark.parametrize(("goal", "name"), [("forwards", "mezo"), ("adapter", "recompute")])
def test_other_goals(goal, name):
    model = small()
    model.head.requires_grad_(goal == "forwards")
    found = surgery.fit(model, BATCH, "1GB", goal=goal)
    assert any(name in row.spec for row in found.rows) and found.best is not None


def test_adapters_are_put_on_the_model_of_a_config(monkeypatch):
    from peft import LoraConfig, get_peft_model

    few = fitting.GROUPS["adapter"]
    monkeypatch.setattr(fitting, "GROUPS", {"adapter": (few[0][:2], few[1])})
    config = make("llama").config
    found = surgery.fit(config, (2, 24), "1GiB", goal="adapter")
    model = get_peft_model(make("llama"), LoraConfig(r=16, target_modules="all-linear"))
    own = surgery.fit(model, (2, 24), "1GiB", goal="adapter")
    *rows, beside = found.rows  # the last one is of a model without adapters
    assert [row.peak for row in rows] == [row.peak for row in own.rows]
    assert "two blocks or more" in beside.note and beside.before == ()
    assert found.best is not None and "get_peft_model(model, LoraConfig(" in found.best.lines
    plain = make("llama")
    with pytest.raises(surgery.ModelError, match=r"with adapters.*get_peft_model\(model, LoraC"):
        found.apply(plain)
    assert all(p.requires_grad for p in plain.parameters())
    assert own.best is not None and own.best.lines == "# nothing: it fits as it is"
    with pytest.raises(surgery.OptionError, match="no adapters to plan for"):
        surgery.fit(make("llama"), (2, 24), "1GiB", goal="adapter")


def test_a_side_path_is_tried_beside_the_model_of_a_config(monkeypatch):
    few = Composition(names=("sherl", "chunked_loss"), bare=True), Composition(names=())
    monkeypatch.setattr(fitting, "GROUPS", {"adapter": (few,)})
    config = make("llama", **layers("llama", 6)).config
    found = surgery.fit(config, (2, 24), "1GiB", goal="adapter")
    model = surgery.apply(make("llama", **layers("llama", 6)), found.rows[0].spec)
    assert found.best is found.rows[0]
    assert found.best.lines == "surgery.apply(model, ['sherl', 'chunked_loss'])"
    wanted = surgery.plan(config, (2, 24), ["sherl", "chunked_loss"]).after
    assert found.best.peak == wanted.peak and found.best.activations == wanted.activations
    assert surgery.report(model, batch("llama", rows=2, length=24)).after.activations == (
        pytest.approx(wanted.activations, rel=0.02)
    )


def test_a_model_in_evaluation_mode_is_played_as_it_will_be_trained(monkeypatch):
    """As from_pretrained gives it: checkpoints work in training mode only."""
    two = (Composition(names=()), Composition(names=(), checkpointing=True))
    monkeypatch.setattr(fitting, "GROUPS", {"full": (two,)})
    inputs, options = batch("llama", rows=4, length=64), layers("llama", 3)
    trained = surgery.fit(make("llama", **options), inputs, "1GiB")
    model = make("llama", **options).eval()
    found = surgery.fit(model, inputs, "1GiB")
    assert [row.peak for row in found.rows] == [row.peak for row in trained.rows]
    assert (found.rows[1].peak or 0) < 0.7 * (found.rows[0].peak or 0)
    assert not any(module.training for module in model.modules())
