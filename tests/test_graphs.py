"""What was done, to look at: code before and after, and a line for each pass."""

from __future__ import annotations

import re

import pytest
import torch
from models import inputs_of, loss_of, make
from torch import nn
from torch.utils.checkpoint import checkpoint

import passes
import surgery


def test_graphs_show_code_before_and_after_with_the_nodes_of_each_pass():
    model = surgery.apply(make("llama"), [passes.Rso(rank=4), passes.Recompute()])
    assert surgery.graphs(model) == []
    loss_of(model, inputs_of("llama"))
    (graph,) = surgery.graphs(model)
    compile(graph.before, "graph", "exec")
    assert "surgery_" not in graph.before and "surgery_graph_nodes_gate(" in graph.after
    signed = re.findall(r"= .*?(\w+)\(.*# <- (\w+)$", graph.after, re.M)
    assert ("surgery_subspace_nodes_project", "rso") in signed
    assert any(name == "recompute" and "recomputed" in call for call, name in signed)
    assert {name for _, name in signed} == {"rso", "recompute"} == set(graph.inserted)
    for name, count in graph.inserted.items():
        assert sum(sign == name for _, sign in signed) <= count
        assert f"{count} nodes of {name}" in str(graph)


def test_graphs_show_checkpointed_regions():
    model = make("llama", num_hidden_layers=2)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    surgery.apply(model, passes.Rso(rank=4))
    loss_of(model, inputs_of("llama"))
    (graph,) = surgery.graphs(model)
    assert graph.after.count("# wrap_body") == 2
    assert re.search(r"# wrap_body.*?# <- rso", graph.after, re.S)


def test_graphs_of_nothing_is_an_error():
    with pytest.raises(surgery.ModelError, match="nothing was applied"):
        surgery.graphs(make("plain"))


def test_the_log_names_each_pass_with_time_nodes_and_bytes(monkeypatch, capsys):
    monkeypatch.setenv("SURGERY_LOG", "passes")
    model = surgery.apply(make("llama"), [passes.Recompute(), passes.ChunkedLoss()])
    loss_of(model, inputs_of("llama"))
    said = capsys.readouterr().err
    pattern = r"surgery: (\w+): [\d.]+ s, (\d+) nodes added to \d+, ([\d.,]+) MB (?:less|more) kept"
    found = re.findall(pattern, said)
    assert [name for name, *_ in found] == ["chunked_loss", "recompute"]
    assert all(int(count) for _, count, _ in found)
    monkeypatch.setenv("SURGERY_LOG", "")
    torch.compiler.reset()
    surgery.remove(model)
    loss_of(surgery.apply(model, "recompute"), inputs_of("llama"))
    assert not capsys.readouterr().err


def test_an_unknown_log_is_an_error_before_anything_changes(monkeypatch):
    monkeypatch.setenv("SURGERY_LOG", "passes, grpahs")
    model = make("llama")
    with pytest.raises(surgery.OptionError, match=r"'grpahs', which is not a .*SURGERY_LOG=passes"):
        surgery.apply(model, "misa", budget=0.5)
    monkeypatch.delenv("SURGERY_LOG")
    surgery.apply(model, "misa", budget=0.5)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(this, x):
        return this.layers(x).sin()


class Named(nn.Module):
    """A forward that calls its first argument otherwise, and layers in a container of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(s, x):  # that is the point
        for block in s.blocks:
            x = x + block(x)
        return x.square().mean()


class Breaks(Named):
    """Captured block by block: a block is the first argument there."""

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
            torch._dynamo.graph_break()
        return x.square().mean()


class Checkpointed(Named):
    def forward(self, x):
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return x.square().mean()


@pytest.mark.parametrize("kind", [Named, Breaks, Checkpointed])
def test_places_in_reports_are_the_models_own_names(kind):
    model = surgery.apply(kind(), "compress")
    found = surgery.report(model, {"x": torch.randn(64, 32)})
    places = {kept.where for kept in found.kept}
    names = {n for n, _ in model.named_modules()}
    known = {".".join("*" if part.isdigit() else part for part in n.split(".")) for n in names}
    assert places <= known, places
    if kind is not Checkpointed:
        assert any(place.startswith("blocks.*.layers") for place in places)
    assert all("surgery" in g.after for g in surgery.graphs(model))
