"""`apply(..., backend=...)`: rewritten graphs under torch's compilers."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from laws import ADAPTED, adamw, own, run_two_ranks, state_of
from models import adapt, inputs_of, loss_of, make
from torch import nn

import passes
import surgery
from surgery.memory import measure

CPU = torch.device("cpu")
FIXED = {
    "recompute": lambda: passes.Recompute(),
    "chunked_loss": lambda: passes.ChunkedLoss(),
    "both": lambda: [passes.Recompute(), passes.ChunkedLoss()],
    "velora": lambda: passes.Velora(groups=4),
    "velora dense": lambda: passes.Velora(groups=4, dense=True, init="random", scale=0.5),
    "rso": lambda: passes.Rso(rank=4, period=2, on_resample="transport"),
    "rso by width": lambda: passes.Rso(rank=4, share="width", always=r".*(ln_f|norm)\.weight"),
    "sherl": lambda: passes.Sherl(),
    "all": lambda: [passes.Rso(rank=4, share=False), passes.Recompute(), passes.ChunkedLoss()],
}
PROJECTING = [name for name in FIXED if name not in ("recompute", "chunked_loss", "both")]


def assert_same_run(family: str, row: str, backend: str, checkpointed=False, **options) -> None:
    """Four steps on batches of two shapes: the losses and weights of the same run without a
    backend, and without surgery where that gives the same."""
    eager, ours = make(family, **options), make(family, **options)
    if checkpointed:
        for model in (eager, ours):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    if row in PROJECTING:
        surgery.apply(eager, FIXED[row]())
    surgery.apply(ours, FIXED[row](), backend=backend)
    optimizers = [adamw(model) for model in (eager, ours)]
    for seed, length in ((1, 12), (2, 12), (3, 17), (4, 12)):
        inputs = inputs_of(family, seed=seed, length=length)
        losses = []
        for model, optimizer in zip((eager, ours), optimizers, strict=True):
            torch.manual_seed(seed)  # the same dropout masks
            loss = loss_of(model, inputs)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert state_of(ours).clock.step == 4
    for name, parameter in own(ours).items():
        expected = eager.get_parameter(name)
        # Adam's first steps are signs: of gradients that are nothing but rounding, too.
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-4, msg=name)
    surgery.remove(ours)
    loss_of(ours, inputs).backward()


@pytest.mark.parametrize(
    ("row", "family"),
    [(row, "plain") for row in ("recompute", "velora", "velora dense", "rso", "sherl")]
    + [("chunked_loss", "llama"), ("all", "llama"), ("both", "gpt2"), ("rso by width", "gpt2")],
)
def test_aot_autograd_gives_eagers_run(row, family):
    assert_same_run(family, row, "aot_eager")


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("row", ["velora", "all"])
def test_inductor_gives_eagers_run(row):
    assert_same_run("llama", row, "inductor")


@pytest.mark.parametrize("row", ["recompute", "rso"])
def test_checkpointed_regions_are_compiled_too(row):
    assert_same_run("llama", row, "aot_eager", checkpointed=True)


def test_the_report_measures_what_was_compiled():
    model = surgery.apply(make("llama"), "recompute", backend="aot_eager")
    inputs = inputs_of("llama")
    found = surgery.report(model, inputs)
    assert found.after.activations == measure(lambda: loss_of(model, inputs), CPU).live
    assert not found.kept and dict(found.lines)["compiled by"] == "aot_eager"
    assert "saved by" not in str(found)


def test_a_function_may_be_the_backend():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = surgery.apply(make("plain"), "recompute", backend=backend)
    loss_of(model, inputs_of("plain")).backward()
    assert len(graphs) == 1 and any("region" in str(n.name) for n in graphs[0].graph.nodes)


@pytest.mark.parametrize("spec", [n for n in surgery.available() if n not in FIXED])
def test_passes_that_a_compiler_would_fix_are_refused_by_name(spec):
    model = make("llama", num_hidden_layers=2)
    model = adapt(model, "lora") if spec in ADAPTED else model
    options = {"trim": {"used": [3]}, "galore": {"rank": 4}}.get(spec, {})
    with pytest.raises(surgery.OptionError, match=rf"{spec} decides anew.*Leave backend= "):
        surgery.apply(model, spec, backend="inductor", **options)
    assert "forward" not in model.__dict__


def test_an_unknown_backend_is_told_before_anything_changes():
    model = make("llama")
    with pytest.raises(surgery.OptionError, match="Did you mean 'inductor'"):
        surgery.apply(model, "recompute", backend="inductr")
    assert "forward" not in model.__dict__


def test_dropout_in_a_recomputed_region_is_refused():
    model = surgery.apply(adapt(make("llama"), "dropout"), "recompute", backend="aot_eager")
    with pytest.raises(surgery.CaptureError, match="would draw another mask"):
        loss_of(model, inputs_of("llama"))


@pytest.mark.parametrize("row", ["recompute", "rso"])
def test_torch_compile_around_surgery_compiles_the_rewritten_graph(row):
    eager, ours = (surgery.apply(make("llama"), FIXED[row]()) for _ in range(2))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    outer = torch.compile(ours, backend=backend)
    optimizers = [adamw(model) for model in (eager, ours)]
    for seed in range(3):
        inputs = inputs_of("llama", seed=seed)
        losses = []
        for model, optimizer in zip((eager, outer), optimizers, strict=True):
            loss = loss_of(model, inputs)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert state_of(ours).clock.step == 3
    mark = "region" if row == "recompute" else "resolved"
    assert any(mark in node.name for graph in graphs for node in graph.graph.nodes)
    assert dict(surgery.report(ours, inputs).lines)["compiled by"] == "backend"


@pytest.mark.parametrize("row", ["misa", "mezo", "compress"])
def test_torch_compile_around_what_it_would_fix_is_refused(row):
    model = surgery.apply(make("llama", num_hidden_layers=2), row)
    outer = torch.compile(model, backend="aot_eager")
    with pytest.raises(surgery.OptionError, match=rf"aot_eager would freeze what {row} decides"):
        loss_of(outer, inputs_of("llama"))
    loss_of(model, inputs_of("llama")).backward()


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.norm = Norm()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x).relu()
        torch._dynamo.graph_break()
        return self.norm(x)


class Broken(nn.Module):
    """Blocks between which Dynamo starts a new graph: one serves them all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x


def test_one_compiled_graph_serves_many_layers():
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    eager = Broken()
    ours = copy.deepcopy(eager)
    spec = passes.Rso(rank=4, period=2, always=["norm.weight"])
    surgery.apply(eager, spec)
    surgery.apply(ours, spec, backend="aot_eager")
    optimizers = [adamw(model) for model in (eager, ours)]
    for _ in range(4):
        for model, optimizer in zip((eager, ours), optimizers, strict=True):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in own(ours).items():
        torch.testing.assert_close(parameter, eager.get_parameter(name), msg=name)
    assert (
        state_of(ours).dispatch.captures == 3
    )  # norms, Linears, the first of which passes no gradient on


def test_layers_of_two_kinds_get_graphs_of_their_own():
    spec = passes.Rso(rank=4, targets=["layers.0.linear", "layers.1.linear"])
    torch.manual_seed(0)
    eager = Broken()
    ours = copy.deepcopy(eager)
    surgery.apply(eager, spec)
    surgery.apply(ours, spec, backend="aot_eager")
    x = torch.randn(4, 16)
    for model in (eager, ours):
        optimizer = adamw(model)
        for _ in range(2):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in own(ours).items():
        torch.testing.assert_close(parameter, eager.get_parameter(name), msg=name)


def test_stacked_experts_are_refused():
    options = {"experts_implementation": "grouped_mm"}
    model = surgery.apply(make("mixtral", **options), passes.Rso(rank=4), backend="aot_eager")
    with pytest.raises(surgery.CaptureError, match=r"rows of each expert.*leave backend= out"):
        loss_of(model, inputs_of("mixtral"))


def test_two_processes(tmp_path):
    """Under DDP and FSDP2: the run without a backend, to the bit."""
    script = """
        import sys; sys.path.insert(0, "tests")
        import torch
        from torch.nn.parallel import DistributedDataParallel
        from models import make, inputs_of, loss_of
        from ranks import begin, shard
        import passes, surgery

        rank = begin()

        def run(spec, wrap, backend):
            model = make("plain")
            surgery.apply(model, spec, backend=backend)
            outer = DistributedDataParallel(model) if wrap == "ddp" else shard(model)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
            losses = []
            for seed in range(3):
                inputs = inputs_of("plain", rows=4, seed=seed)
                loss = loss_of(outer, {k: v.chunk(2)[rank] for k, v in inputs.items()})
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            return losses

        for wrap in ("ddp", "fsdp2"):
            spec = passes.Rso(rank=4, period=2)
            assert run(spec, wrap, "aot_eager") == run(spec, wrap, None), wrap
        print("equal")
        """
    run_two_ranks(script, tmp_path)
