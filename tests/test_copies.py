"""Law 14 beyond test_laws.py: copies of graphs and transformers, with their optimizers; modes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from laws import PASSES, ZEROTH, adamw, each_pass, own, train, weights
from models import inputs_of, loss_of, make

import surgery

# AdamW over the scalars of zeroth-order passes
pytestmark = pytest.mark.filterwarnings("ignore:.*scalars that")


@pytest.mark.parametrize(
    ("row", "family"),
    [("lisa", "graph"), ("badam", "graph"), ("misa", "gpt2"), ("rso", "plain")],
)
def test_14_deepcopy_is_an_independent_surgery(row, family):
    model = make(family)
    surgery.apply(model, PASSES[row]())
    optimizer = train(model, family, 3)
    twin = copy.deepcopy(model)
    twin_optimizer = adamw(twin)
    names = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:
            twin_optimizer.state[names[name]] = copy.deepcopy(optimizer.state[parameter])
    before = weights(model)
    for seed in range(4):
        torch.manual_seed(seed)  # the same dropout masks
        train(twin, family, 1, twin_optimizer)
    assert all(torch.equal(p, before[n]) for n, p in own(model).items())
    for seed in range(4):
        torch.manual_seed(seed)
        train(model, family, 1, optimizer)
    for name, parameter in own(model).items():
        assert torch.equal(parameter, own(twin)[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("row", ["misa", "lisa", "badam", "rso"])
def test_14_weights_that_are_loaded_into_a_copy_are_trained_from(row, way, dtype):
    """Before its first forward nothing of a copy is bound, and versions tell nothing of it."""
    model = surgery.apply(make("gpt2").to(dtype), PASSES[row]())
    optimizer = train(model, "gpt2", 3)
    twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    loaded = {n: p + 0.01 * (1 + p.abs()) for n, p in weights(twin).items()}
    losses = []
    for each in (model, twin):
        missing = each.load_state_dict(loaded, strict=False).missing_keys
        assert not set(missing) & loaded.keys()
        losses.append(loss_of(each.eval(), inputs_of("gpt2")))  # both say where training goes on
        each.train()
        with torch.no_grad():
            for c in surgery.coordinates(each):
                if c.active and c.parameter.shape == each.get_parameter(c.weight).shape:
                    held = c.parameter.to(loaded[c.weight])
                    torch.testing.assert_close(held, loaded[c.weight], rtol=0, atol=0)
    assert torch.equal(*losses)
    states = [optimizer, adamw(twin)]
    names = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:
            states[1].state[names[name]] = copy.deepcopy(optimizer.state[parameter])
    for each, steps in zip((model, twin), states, strict=True):
        torch.manual_seed(0)
        train(each, "gpt2", 2, steps)
    for name, parameter in own(model).items():
        torch.testing.assert_close(own(twin)[name], parameter, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("row", "family", "dump"),
    [("misa", "gpt2", "torch"), ("lisa", "plain", "torch"), ("rso", "llama", "pickle")],
)
def test_14_pickle(row, family, dump):
    model = make(family).eval()
    surgery.apply(model, PASSES[row]())
    train(model, family, 3)
    if dump == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    for each in (model, twin):
        train(each, family, 3)
    for name, parameter in own(model).items():
        assert torch.equal(parameter, own(twin)[name]), name


@each_pass
def test_14_train_and_eval(row):
    model = make("smooth")
    surgery.apply(model, PASSES[row]())
    inputs = inputs_of("smooth")
    model.eval()
    expected = loss_of(model, inputs)
    with torch.no_grad():
        plain = loss_of(model, inputs)
    if row in ZEROTH:
        torch.testing.assert_close(plain, expected.detach(), rtol=1e-3, atol=1e-4)
    else:
        assert torch.equal(plain, expected)
    model.train()
    assert not torch.equal(loss_of(model, inputs), expected)  # dropout
    assert model.training
