"""Models of one kind share what Dynamo traces of them, and nothing else."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from laws import state_of, weights
from models import inputs_of, loss_of, make
from packaging.version import Version
from torch import nn

import passes
import surgery
from surgery.engine import captures as sharing


@pytest.fixture
def traces(monkeypatch, no_captures):
    """The graphs that Dynamo has traced."""
    seen = []
    plain = sharing._traced
    monkeypatch.setattr(sharing, "_traced", lambda g, inputs: seen.append(g) or plain(g, inputs))
    return seen


def test_two_models_of_one_kind_share_a_trace_and_nothing_else(traces):
    one, two, third = make("plain", seed=0), make("plain", seed=1), make("plain", seed=2)
    surgery.apply(one, "misa", budget=1.0)
    surgery.apply(two, "misa", budget=0.2)
    surgery.apply(third, "recompute")
    expected = [loss_of(make("plain", seed=seed), inputs_of("plain")) for seed in range(3)]
    for model, loss in zip((one, two, third), expected, strict=True):
        found = loss_of(model, inputs_of("plain"))
        assert torch.equal(found, loss)
        found.backward()
        assert state_of(model).dispatch.captures == 1
    trained = [sum(p.grad is not None for p in m.parameters()) for m in (one, two, third)]
    assert trained[0] == 6 and 0 < trained[1] < 6 and trained[2] == len(list(third.parameters()))
    # for recompute weights require gradients that samplers do not train: Dynamo's guards say no
    assert len(traces) == 2 and not any("gate" in graph.code for graph in traces)
    codes = [surgery.graphs(m)[0].after for m in (one, two, third)]
    assert "recomputed" in codes[2] and not any("recomputed" in code for code in codes[:2])
    # taken out and put on again, another way
    surgery.apply(surgery.remove(one), passes.Rso(rank=2))
    loss_of(one, inputs_of("plain", seed=3)).backward()
    assert len(traces) == 2
    two.blocks[0].up.register_forward_hook(lambda module, args, output: output * 2)
    loss_of(two, inputs_of("plain")).backward()
    assert len(traces) == 3
    del one, two, third, model
    gc.collect()
    assert not sharing.CAPTURES


@pytest.mark.parametrize("change", ["wider", "deeper", "another module", "dtype"])
def test_models_of_other_kinds_are_traced_anew(traces, change):
    def built(other):
        torch.manual_seed(0)
        width = 8 if other and change == "wider" else 4
        layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)]
        if other and change == "deeper":
            layers += [nn.Linear(width, width)]
        if other and change == "another module":
            layers[1] = nn.Tanh()
        model = Stacked(layers)
        return model.double() if other and change == "dtype" else model

    for other in (False, True):
        model, plain = surgery.apply(built(other), "recompute"), built(other)
        x = torch.randn(3, plain.layers[0].in_features, dtype=plain.layers[0].weight.dtype)
        assert torch.equal(model(x), plain(x))
    assert len(traces) == 2


class Stacked(nn.Module):
    def __init__(self, layers) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_what_an_instance_holds_is_guarded(traces):
    """Numbers, flags and functions of a model are not its class's."""
    models = [Held(2.0, torch.relu), Held(3.0, torch.relu), Held(3.0, torch.tanh)]
    x = torch.randn(4, 4)
    for model in models:
        expected = model(x)
        assert torch.equal(surgery.apply(model, "recompute")(x), expected)
    assert len(traces) == 3


class Held(nn.Module):
    def __init__(self, scale, function) -> None:
        super().__init__()
        self.linear, self.scale, self.function = nn.Linear(4, 4), scale, function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.linear(x)) * self.scale


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"), reason="its Dynamo loses its settings in threads"
)
def test_models_of_one_kind_train_in_threads():
    def trained(seed, model, out):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(6):
            loss_of(model, inputs_of("plain", seed=step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        out[seed] = weights(model)

    def built(seed):
        return surgery.apply(make("plain", seed=seed), "misa", budget=0.3, period=2, seed=seed)

    alone, together = {}, {}
    for seed in (0, 1):
        trained(seed, built(seed), alone)
    threads = [
        threading.Thread(target=trained, args=(seed, model, together))
        for seed, model in enumerate(map(built, (0, 1)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, expected in alone.items():
        for name, value in expected.items():
            # a thread adds up in another order
            torch.testing.assert_close(together[seed][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["hook", "forward"])
def test_what_breaks_one_models_graph_breaks_no_others(no_captures, how):
    """Dynamo's guards do not keep the pieces from models without the hook."""

    def pieces(model) -> int:
        with state_of(model).dispatch.listening() as graphs:
            loss_of(model, inputs_of("plain"))
        return len(graphs)

    def applied():
        return surgery.apply(make("plain"), passes.Rso(rank=2))

    broken, beside = applied(), applied()
    assert pieces(broken) == pieces(beside) == 1
    inner, said = broken.blocks[-1].up, []
    if how == "hook":
        inner.register_forward_hook(lambda *_: said.append(torch._dynamo.is_compiling()))
    else:
        plain = inner.forward
        inner.forward = lambda x: (str(object()), plain(x))[1]
    assert pieces(broken) >= 1
    pieces(beside)  # may meet the pieces once
    assert pieces(beside) == pieces(beside) == 1
    assert pieces(applied()) == 1
    later = make("plain")
    later.blocks[-1].up.register_forward_hook(lambda *_: said.append(str(object())))
    assert pieces(surgery.apply(later, passes.Rso(rank=2))) >= 1
    assert pieces(applied()) == 1


GOES = [
    ["recompute"],
    [passes.Compress(bits=8)],
    [passes.Misa(budget=0.2), "recompute"],
    [passes.Rso(rank=2)],
    [passes.Mezo()],
]


@pytest.mark.parametrize("passes", GOES, ids=lambda passes: str(passes[0]).split("(")[0])
def test_a_surgery_that_is_taken_out_leaves_no_graph_behind(passes, no_captures):
    """Python cannot find a circle that goes through autograd's saved tensors, in C++."""
    model, inputs = make("plain"), inputs_of("plain")

    def life() -> int:
        surgery.apply(model, passes)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        loss_of(model, inputs).backward()
        optimizer.step()
        del optimizer
        surgery.remove(model)
        gc.collect()
        return sum(type(each) is torch.fx.Node for each in gc.get_objects())

    lives = [life() for _ in range(4)]
    assert len(set(lives[1:])) == 1, lives
