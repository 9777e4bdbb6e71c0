"""LISA's draws: uniform, and by outliers as OWS and OWL have them."""

from __future__ import annotations

import collections
import itertools

import pytest
import torch
from laws import method_of, own
from models import adapt, batch, inputs_of, loss_of, make
from torch import nn

import passes
import surgery
from surgery.sampling.rounds import Rounds


def peaky(family: str = "llama", count: int = 4) -> nn.Module:
    """Make a model whose blocks have more and more large entries."""
    options = {"n_layer": count} if family == "gpt2" else {"num_hidden_layers": count}
    model = make(family, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for place, block in enumerate(blocks_of(model)):
            for p in (p for p in block.parameters() if p.ndim > 1):
                p[torch.rand(p.shape, generator=generator) < 0.004 * (1 + place)] *= 30
    return model


def share(entries: list[torch.Tensor], threshold: float) -> float:
    """D of one block, as OWL's code has it."""
    flat = torch.cat([each.flatten() for each in entries])
    return float((flat > threshold * flat.mean()).double().mean())


def blocks_of(model: nn.Module) -> list[nn.Module]:
    found = getattr(model, "model", None) or model.get_submodule("transformer")
    return [*(found.layers if hasattr(found, "layers") else found.h)]  # pyright: ignore


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_outliers_are_those_of_owl_without_inputs(family):
    model = peaky(family)
    method = passes.Lisa(weights="outliers").start(model)
    found = [*method.draw.ratios.values()]  # pyright: ignore[reportFunctionMemberAccess]
    expected = [
        share([p.detach().abs() for p in block.parameters() if p.ndim > 1], 5.0)
        for block in blocks_of(model)
    ]
    assert found == pytest.approx(expected)
    assert found == sorted(found) and found[0] < 0.6 * found[-1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_outlier_ratios_are_those_of_owl(family):
    """|W| times the norm of the inputs, which are taken from the outputs of other modules here."""
    model = peaky(family, 2)
    batches = [batch(family, seed=seed) for seed in (1, 2)]
    before = torch.get_rng_state()
    found = passes.outlier_ratios(model, batches, threshold=6.0)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert not any(m._forward_pre_hooks for m in model.modules())
    inputs = collections.defaultdict(list)
    for module in [m for b in blocks_of(model) for m in b.modules() if hasattr(m, "weight")]:
        if module.get_parameter("weight").ndim < 2:
            continue
        module.register_forward_hook(lambda m, given, _: inputs[m].append(given[0]))  # pyright: ignore
    model.eval()
    with torch.no_grad():
        for each in batches:
            model(**each)
    expected = []
    for block in blocks_of(model):
        entries = []
        for module in (m for m in block.modules() if m in inputs):
            x = torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in inputs[module]])
            matrix = module.get_parameter("weight")
            matrix = matrix.t() if family == "gpt2" else matrix
            entries.append(matrix.detach().abs() * x.norm(dim=0))
        expected.append(share(entries, 6.0))
    assert found == pytest.approx(expected)
    surgery.apply(model, passes.Lisa(layers=1, weights=found))
    surgery.remove(model)


def test_blocks_are_drawn_one_after_another_in_proportion_to_their_weights():
    model = make("llama", num_hidden_layers=4)
    given = (0.1, 0.2, 0.3, 0.0)
    draw = passes.Lisa(layers=2, weights=given).start(model).draw
    names = [f"model.layers.{i}" for i in range(4)]
    found = collections.Counter(tuple(draw(round)) for round in range(6000))
    for i, j in itertools.permutations(range(3), 2):
        first = given[i] / sum(given)
        expected = 6000 * first * given[j] / (sum(given) - given[i])
        assert abs(found[names[i], names[j]] - expected) < 4 * expected**0.5
    assert sum(found.values()) == 6000 and not any(names[3] in pair for pair in found)


def test_a_resumed_run_draws_by_the_weights_that_it_began_with(tmp_path):
    spec = passes.Lisa(layers=1, weights="outliers", period=1)
    model = surgery.apply(peaky(), spec)
    ratios = dict(method_of(model, Rounds).draw.ratios)  # pyright: ignore
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        loss_of(model, inputs_of("llama")).backward()
        optimizer.step()
        optimizer.zero_grad()
    surgery.save(model, tmp_path, optimizer)
    other = surgery.apply(make("llama", seed=5, num_hidden_layers=4), spec)
    assert method_of(other, Rounds).draw.ratios != ratios  # pyright: ignore
    surgery.load(other, tmp_path, torch.optim.AdamW(other.parameters(), lr=0.1))
    assert method_of(other, Rounds).draw.ratios == ratios  # pyright: ignore
    assert all(torch.equal(p, own(other)[n]) for n, p in own(model).items())


def test_without_an_outlier_all_blocks_are_alike():
    """A block without any counts as one with one."""
    draw = passes.Lisa(layers=1, weights="outliers", threshold=1e6).start(make("llama")).draw
    assert len({*draw.ratios.values()}) == 1 and min(draw.ratios.values()) > 0  # pyright: ignore


def test_adapters_are_drawn_by_the_blocks_that_they_are_in():
    model = adapt(peaky(), "lora")
    ratios = passes.Lisa(weights="outliers").start(model).draw.ratios  # pyright: ignore
    assert [*ratios.values()] == sorted(ratios.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "outlier"}, r"weights='outlier' is a str; it takes"),
        ({"weights": (0.5, -1.0, 1.0)}, r"\[-1\.0\]; each must be finite and >= 0"),
        ({"weights": (0.5, 1.0)}, "2 numbers, but the model has 3 blocks"),
        ({"weights": (0.5, 0.0, 0.0), "layers": 2}, "above 0 for only 1 of the blocks"),
        ({"threshold": 0.0}, "threshold=0.0 must be above 0"),
    ],
    ids=["a word", "negative", "too few", "mostly zero", "threshold"],
)
def test_weights_that_cannot_be_are_refused(options, message):
    with pytest.raises(surgery.OptionError, match=message):
        surgery.apply(make("plain"), "lisa", **options)


def test_ratios_without_a_forward_say_so():
    with pytest.raises(surgery.TargetError, match="Give some batches"):
        passes.outlier_ratios(make("llama"), [])
