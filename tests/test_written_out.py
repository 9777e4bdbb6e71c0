"""Linears that a model writes out as products with a transposed weight."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import passes
import surgery

WRITTEN_OUT = {
    "x @ W.T": lambda x, w: x @ w.T,
    "x @ W.mT": lambda x, w: x @ w.mT,
    "matmul(x, W.t())": lambda x, w: torch.matmul(x, w.t()),
    "x.matmul(W.transpose(0, 1))": lambda x, w: x.matmul(w.transpose(0, 1)),
    "x @ W.H": lambda x, w: x @ w.H,
    "x @ W.mH": lambda x, w: x @ w.mH,
    "x @ W.adjoint()": lambda x, w: x @ w.adjoint(),
    "x @ W.swapdims(0, 1)": lambda x, w: x @ w.swapdims(0, 1),
    "x @ W.permute(1, 0)": lambda x, w: x @ w.permute(1, 0),
}


@pytest.mark.parametrize("form", WRITTEN_OUT)
def test_a_linear_that_is_written_out_is_one(form):
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(16, 8))
            self.down = nn.Linear(16, 8)

        def forward(self, x):
            return self.down(WRITTEN_OUT[form](x, self.weight).relu())

    x = torch.randn(3, 5, 8)
    plain = Written()
    expected = plain(x)
    expected.square().mean().backward()
    for spec in (passes.Rso(rank=4), passes.Velora(groups=4), passes.Recompute()):
        model = Written()
        surgery.apply(model, spec)
        found = model(x)
        assert torch.equal(found, expected)
        found.square().mean().backward()
        if isinstance(spec, passes.Rso):
            for each in surgery.coordinates(model):
                slope = each.parameter.grad
                dense = plain.get_parameter(each.weight).grad
                # <grad, expand(slope)> = <P^T grad, slope>, and the latter is |slope|^2
                pulled = (dense * each.expand(slope)).sum()
                torch.testing.assert_close(pulled, slope.square().sum(), rtol=1e-4, atol=1e-7)
        elif isinstance(spec, passes.Recompute):
            torch.testing.assert_close(model.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("pass_", ["rso", "velora", "misa", "mezo"])
def test_falcon_writes_its_linears_out(pass_):
    config = transformers.FalconConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
    )
    torch.manual_seed(0)
    model = transformers.FalconForCausalLM(config).train()
    ids = torch.randint(0, 96, (2, 12))
    plain = model(input_ids=ids, labels=ids).loss.item()
    options = {"rso": {"rank": 4}, "velora": {"groups": 4}, "misa": {"budget": 0.3}}.get(pass_, {})
    surgery.apply(model, pass_, **options)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.item() == pytest.approx(plain, rel=1e-2 if pass_ == "mezo" else 1e-6)
