"""Cheap operations that run as one kernel: the gradients of single ones, and no more is kept."""

from __future__ import annotations

import pytest
import torch
from laws import own
from models import inputs_of, loss_of, make
from torch.autograd.graph import saved_tensors_hooks

import passes
import surgery
from surgery.compat import inductor
from surgery.kernels import plan
from surgery.kernels.compiled import Compiled

pytestmark = pytest.mark.filterwarnings("ignore:.*scalars that")


def model_of(family: str, what: plan.Forced, spec):
    torch.manual_seed(0)
    model = make(family).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with plan.forced(what):
        surgery.apply(model, spec())
        loss = loss_of(model, inputs_of(family))
    return model, loss


def groups(model) -> int:
    return sum(graph.after.count("fused_operations") for graph in surgery.graphs(model))


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "mixtral"])
def test_gradients_are_those_of_single_operations(family):
    found = {}
    for what in ("cpu", "accelerator"):
        model, loss = model_of(family, what, passes.Recompute)
        with plan.forced(what):
            loss.backward()
        found[what] = loss.item(), {k: p.grad for k, p in own(model).items()}
        assert (groups(model) > 0) == (what == "accelerator")
    assert found["accelerator"][0] == pytest.approx(found["cpu"][0], rel=1e-6)
    for name, gradient in found["cpu"][1].items():
        torch.testing.assert_close(
            found["accelerator"][1][name], gradient, rtol=1e-4, atol=1e-6, msg=name
        )


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "t5"])
def test_nothing_more_is_kept(family):
    kept = {}
    for what in ("cpu", "accelerator"):
        model, _ = model_of(family, what, passes.Recompute)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes: dict[int, int] = {}

        def pack(t, weights=weights, sizes=sizes):
            storage = t.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return t

        with plan.forced(what), saved_tensors_hooks(pack, lambda t: t):
            loss = loss_of(model, inputs_of(family))
        kept[what] = sum(sizes.values())
        del loss
    assert kept["accelerator"] <= kept["cpu"]


def test_a_graph_may_be_kept_for_a_second_backward():
    model, loss = model_of("llama", "accelerator", passes.Recompute)
    with plan.forced("accelerator"):
        loss.backward(retain_graph=True)
        first = {k: p.grad.clone() for k, p in own(model).items()}
        model.zero_grad()
        loss.backward()
    assert groups(model) > 0
    for name, gradient in first.items():
        assert torch.equal(own(model)[name].grad, gradient), name


def test_second_derivatives_are_refused_by_name():
    model, loss = model_of("llama", "accelerator", passes.Recompute)
    weight = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    with plan.forced("accelerator"), pytest.raises(surgery.SurgeryError, match="recompute"):
        torch.autograd.grad(loss, weight, create_graph=True)


def test_a_frozen_part_gets_no_gradient():
    torch.manual_seed(0)
    model = make("llama").train()
    model.model.layers[0].requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    with plan.forced("accelerator"):
        surgery.apply(model, passes.Recompute())
        loss_of(model, inputs_of("llama")).backward()
    grads = {k: p.grad is not None for k, p in own(model).items()}
    assert grads["lm_head.weight"] and not grads["model.layers.0.mlp.up_proj.weight"]


def test_forwards_alone_take_the_loss_too():
    losses = {}
    for what in ("cpu", "accelerator"):
        model, loss = model_of("llama", what, passes.Mezo)
        losses[what] = loss.item()
        code = "".join(graph.after for graph in surgery.graphs(model))
    assert losses["accelerator"] == pytest.approx(losses["cpu"], rel=1e-5)
    fused = code.split("# fused_")[1:]
    assert any("cross_entropy" in body for body in fused)
    assert any("rsqrt" in body for body in fused)


# -- what code for all sizes is right for ----------------------------------------------------------


def grouped(x, count, key):
    return x.view(count, -1).sum(1) + key


@pytest.mark.parametrize("count", [True, False])
def test_code_for_all_sizes_is_used_where_it_is_right(count):
    made = Compiled(grouped, count, static=False)
    for size, groups_, key in ((12, 3, 100), (12, 4, 7), (24, 4, -9), (16, 16, 5), (5, 1, 2)):
        x = torch.randn(size)
        torch.testing.assert_close(made(x, groups_, key), grouped(x, groups_, key))
    assert len(made.made) == 3  # count equal to the size; count of 1; all others


def test_integers_that_code_depends_on_are_kept_apart():
    def repeated(x, times):
        total = x
        for _ in range(int(times)):
            total = total + x
        return total

    made = Compiled(repeated, True, static=False)
    x = torch.randn(4)
    for times in (2, 3, 2, 5, 3):
        torch.testing.assert_close(made(x, times), x * (times + 1))


@pytest.mark.parametrize("static", [True, False])
def test_layouts_and_equal_sizes(static):
    made = Compiled(lambda a, b: a + b, True, static=static)
    for shape in ((3, 5), (4, 4), (1, 6), (6, 1), (0, 3)):
        for transposed in (False, True):
            a = torch.randn(shape).t() if transposed else torch.randn(shape)
            b = torch.randn(a.shape)
            assert torch.equal(made(a, b), a + b)
    gaps = torch.randn(6, 8)[::2, ::2]
    assert torch.equal(made(gaps, gaps), gaps + gaps)
    row = torch.randn(1, 5)
    assert torch.equal(made(torch.ones(3, 5), row), row.expand(3, 5) + 1)


def test_what_a_compiler_cannot_do_runs_as_it_is(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("CantSplit: s30*s31 not divisible")

    monkeypatch.setattr(inductor, "compiled", broken)
    made = Compiled(lambda a: a * 2, False, static=False)
    with pytest.warns(UserWarning, match="was not compiled .*CantSplit.*correct but slower"):
        assert torch.equal(made(torch.ones(3)), torch.full((3,), 2.0))
    assert torch.equal(made(torch.ones(3)), torch.full((3,), 2.0))  # once a size


def test_traces_are_without_autograd_and_modes():
    weight = torch.nn.Parameter(torch.ones(3))
    graph, structure = inductor.traced(lambda w, k: (w * k, None), [weight, 7], dynamic=True)
    assert structure.num_leaves == 2
    first, second = graph(weight, 9)
    assert torch.equal(first, torch.full((3,), 9.0)) and second is None
    made = inductor.compiled(lambda w, k: w * k, [weight, 7], dynamic=True, count=True)
    assert made.fits([torch.ones(5), 3]) and not made.run(weight, 2).requires_grad
