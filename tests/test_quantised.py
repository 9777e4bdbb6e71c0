"""Adapters over bases of few bits: what a step is predicted to hold, and forwards alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import adapt, batch, build, loss_of, quantise
from test_prediction import EXACT, Case, really
from torch import nn
from torch.optim import SGD

import passes
import surgery
from surgery.memory import storage_bytes

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore")  # both announce their renamings
WIDE = {"hidden_size": 128, "intermediate_size": 384}


def adapted(kind: str) -> nn.Module:
    return adapt(quantise(build("llama", **WIDE), kind), "on every Linear")


class Quantised(Case):  # family: how the base is stored
    def model(self) -> nn.Module:
        return adapted(self.family)

    def batch(self) -> dict[str, torch.Tensor]:
        return batch("llama", rows=2, length=64)


CASES = [
    ("nf4", passes.Velora(groups=8)),
    ("nf4", EXACT),
    ("int8", EXACT),
    ("torchao int8", passes.Velora(groups=8)),
]


@pytest.mark.parametrize(("kind", "spec"), CASES)
def test_the_peak_is_the_allocators(kind, spec):
    case = Quantised(spec=spec, family=kind)
    planned = surgery.plan(case.model(), case.batch(), spec, compile=False)
    for side, each in ((planned.before, None), (planned.after, spec)):
        peak, phase = really(case, each)
        assert side.peak == pytest.approx(peak, rel=0.03), each
        assert side.phase == phase
    assert sum(holder.bytes for holder in planned.holders) == planned.after.peak


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao int8"])
def test_scales_are_counted_with_the_weights(kind):
    plain, model = build("llama", **WIDE), quantise(build("llama", **WIDE), kind)
    entries = sum(
        m.weight.numel() for m in plain.model.layers.modules() if isinstance(m, nn.Linear)
    )
    rows = sum(len(m.weight) for m in plain.model.layers.modules() if isinstance(m, nn.Linear))
    rest = storage_bytes(plain.parameters()) - 4 * entries
    found = storage_bytes(model.parameters()) - rest
    if kind == "nf4":  # a byte for each 64, a float32 for each 256 of these; each a table of 256
        wanted = entries / 2 + entries / 64 + entries / 64 / 64 + 7 * 4 * 256
        assert wanted <= found <= wanted + 7 * 4 * 16 + 64
    else:  # a scale for each row; torchao's keeps a zero point of a byte too
        assert found == entries + (5 if kind == "torchao int8" else 4) * rows


def test_fit_recommends_for_adapters_over_four_bits():
    model, inputs = adapted("nf4"), batch("llama", rows=2, length=64)
    found = surgery.fit(model, inputs, "1GiB", goal="adapter")
    assert found.best is not None and found.best.spec == ()
    assert [row.note for row in found.rows if row.peak is None] == []
    assert found.nearest.spec == found.rows[-1].spec == ("velora", "recompute", "chunked_loss")
    less = found.within(int((found.nearest.peak or 0) * 1.12))
    assert less.best is not None and less.best.spec == found.nearest.spec


class Foreign(nn.Parameter):
    """A weight with an idea of its own what its numbers are."""


def test_a_weight_of_an_unknown_kind_is_named():
    model: Any = build("llama", **WIDE)
    layer = model.model.layers[0].mlp
    layer.up_proj.weight = Foreign(layer.up_proj.weight.data, requires_grad=False)
    found = surgery.plan(model, batch("llama"), passes.Misa(budget=0.5, targets=["q_proj"]))
    said = [text for label, text in found.lines if label == "peak not predicted"]
    assert len(said) == 2 and "layers.0.mlp.up_proj.weight is a Foreign" in said[0]
    assert found.after.peak is None and found.after.parameters


def test_forwards_alone_train_adapters_over_eight_bits():
    """The slope that a step has used is that of plain forwards, one to each side."""
    model, inputs = adapted("int8").double(), batch("llama")
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss_of(model, inputs)  # the first forward of such a base moves its scales
    plain = copy.deepcopy(model)
    surgery.apply(model, passes.Mezo(eps=1e-4))
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    start = {n: p.detach().clone() for n, p in own.items()}
    loss_of(model, inputs).backward()
    optimizer.step()
    moved = {n: (start[n] - p.detach()) / 1e-3 for n, p in own.items()}
    slope = moved[next(iter(moved))].abs().max()
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for n, p in plain.named_parameters():
                if n in own:
                    p.copy_(start[n] + sign * 1e-4 * moved[n] / slope)
            losses.append(loss_of(plain, inputs))
    assert ((losses[0] - losses[1]) / 2e-4).item() == pytest.approx(slope.item(), rel=1e-2)
