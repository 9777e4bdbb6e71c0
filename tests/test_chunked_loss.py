"""chunked_loss: eager's loss and gradients, logits never whole."""

from __future__ import annotations

import copy

import pytest
import torch
from models import DISTINCT, inputs_of, loss_of, make
from torch import nn
from torch.nn import functional

import passes
import surgery
from surgery.logits.cross_entropy import chunked_cross_entropy
from surgery.logits.factored import Factored
from surgery.memory import measure

CPU = torch.device("cpu")
WITH_HEAD = sorted(DISTINCT - {"vit"})


def step(model: nn.Module, inputs: dict[str, torch.Tensor], **more):
    model.zero_grad()
    torch.manual_seed(5)  # the same dropout masks
    output = model(**inputs, **more)
    (3 * output.loss).backward()
    return output


def assert_same(eager: nn.Module, ours: nn.Module, inputs, **more):
    expected, found = step(eager, inputs, **more), step(ours, inputs, **more)
    # Not to the bit in general: a matrix product of fewer rows may be summed in another order.
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    for (name, a), b in zip(eager.named_parameters(), ours.parameters(), strict=True):
        if a.grad is None:
            assert b.grad is None, name
        else:
            # 1e-8: keys of BERT have a bias whose gradient is zero but for rounding
            assert (a.grad - b.grad).norm() <= 2e-6 * a.grad.norm() + 1e-8, name
    return expected, found


def assert_not_computed(t: torch.Tensor) -> None:
    """Of logits: that they have a shape, and no memory."""
    assert isinstance(t, Factored) and isinstance(t, torch.Tensor) and t.settled is None


@pytest.mark.parametrize(("family", "tokens"), [(f, 5) for f in WITH_HEAD] + [("llama", None)])
def test_loss_and_gradients_are_eagers(family, tokens):
    eager = make(family)
    ours = surgery.apply(copy.deepcopy(eager), "chunked_loss", tokens=tokens)
    for options in ({"padding": "right"}, {"padding": "right", "rows": 3, "length": 17}):
        _, found = assert_same(eager, ours, inputs_of(family, **options))
        assert_not_computed(found.logits)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_head_soft_capping_and_number_of_items(tied):
    eager = make("gemma3", tie_word_embeddings=tied, final_logit_softcapping=3.0)
    ours = surgery.apply(copy.deepcopy(eager), "chunked_loss", tokens=7)
    assert_same(eager, ours, inputs_of("gemma3"), num_items_in_batch=torch.tensor(11))


def test_logits_on_request_and_without_gradients():
    eager = make("llama")
    ours = surgery.apply(copy.deepcopy(eager), "chunked_loss", tokens=7, keep_logits=True)
    expected, found = assert_same(eager, ours, inputs_of("llama"))
    torch.testing.assert_close(found.logits, expected.logits.detach())
    assert not found.logits.requires_grad
    surgery.remove(ours)
    surgery.apply(ours, "chunked_loss")
    with torch.no_grad():
        assert torch.equal(ours(**inputs_of("llama")).logits, eager(**inputs_of("llama")).logits)


class Head(nn.Module):
    """The loss of a model of the user's own, with every option of torch's cross entropy."""

    def __init__(self, bias: bool, shifted: bool, **options) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8)])
        self.head = nn.Linear(8, 30, bias=bias)
        self.shifted, self.options = shifted, options

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.layers[0](x)).float()
        if self.shifted:
            logits, y = logits[..., :-1, :].contiguous(), y[..., 1:]
        return functional.cross_entropy(logits.view(-1, 30), y.reshape(-1), **self.options)


# every pair of options, among them all or none
@pytest.mark.parametrize(
    ("bias", "shifted", "smoothing", "reduction"),
    [
        (False, False, 0.0, "mean"),
        (False, True, 0.2, "mean"),
        (True, False, 0.2, "mean"),
        (True, True, 0.0, "mean"),
        (False, False, 0.2, "sum"),
        (False, True, 0.0, "sum"),
        (True, False, 0.0, "sum"),
        (True, True, 0.2, "sum"),
    ],
)
def test_options_of_cross_entropy(bias, shifted, smoothing, reduction):
    torch.manual_seed(0)
    eager = Head(bias, shifted, label_smoothing=smoothing, reduction=reduction, ignore_index=3)
    ours = surgery.apply(copy.deepcopy(eager), "chunked_loss", tokens=4)
    x = torch.randn(2, 9, 8).transpose(0, 1)
    y = torch.randint(0, 6, (9, 2))
    losses = []
    for model in (eager, ours):
        losses.append(model(x, y))
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for a, b in zip(eager.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def test_a_batch_without_any_target_has_no_gradient_as_in_eager():
    eager = Head(True, False)
    ours = surgery.apply(copy.deepcopy(eager), "chunked_loss")
    x, y = torch.randn(2, 3, 8), torch.full((2, 3), -100)
    for model in (eager, ours):
        loss = model(x, y)
        loss.backward()
        assert loss.isnan()
    for a, b in zip(eager.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_frozen_head_needs_no_gradient_of_its_weight():
    model = surgery.apply(make("llama"), [passes.Misa(budget=0.2), passes.ChunkedLoss()])
    loss_of(model, inputs_of("llama")).backward()
    assert model.lm_head.weight.grad is None
    assert any(p.grad is not None for p in model.parameters())


def test_peak_of_head_and_loss_falls_eightfold():
    vocabulary, width, tokens = 16_384, 64, 1024
    body = torch.fx.GraphModule(nn.Module(), _identity())
    weight = torch.randn(vocabulary, width, requires_grad=True)
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    target = torch.randint(0, vocabulary, (tokens,))

    def eager() -> None:
        logits = functional.linear(hidden, weight).float()
        functional.cross_entropy(logits.view(-1, vocabulary), target).backward()

    def chunked() -> None:
        chunked_cross_entropy(body, hidden, weight, None, target, tokens=32).backward()

    peaks = []
    for call in (eager, chunked):
        weight.grad = hidden.grad = None
        peaks.append(measure(call, CPU).peak)
    assert peaks[1] * 8 <= peaks[0]


def _identity() -> torch.fx.Graph:
    graph = torch.fx.Graph()
    logits = graph.placeholder("logits")
    graph.output(logits)
    return graph


def test_backwards_of_one_loss_add_up():
    found = []
    for model in (make("llama"), surgery.apply(make("llama"), "chunked_loss")):
        loss = loss_of(model, inputs_of("llama"))
        (0.3 * loss).backward(retain_graph=True)
        torch.autograd.grad(loss, model.lm_head.weight, retain_graph=True)
        loss.square().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_without_outside_only_losses_of_the_model_are_served():
    model = surgery.apply(make("llama"), "chunked_loss", outside=False)
    assert step(model, inputs_of("llama")).logits is None
    model = surgery.apply(make("llama"), "chunked_loss", outside=False)
    ids = inputs_of("llama")["input_ids"]
    with pytest.raises(surgery.CaptureError, match=r"nothing to do.*labels=labels"):
        model(input_ids=ids)


def test_a_model_without_a_head_has_nothing_to_do():
    model = surgery.apply(make("vit"), "chunked_loss")
    with pytest.raises(surgery.CaptureError, match=r"nothing to do.*wider than their hidden"):
        model(pixel_values=inputs_of("vit")["pixel_values"])


@pytest.mark.parametrize("order", [0, 1])
def test_with_recompute_in_any_order(order):
    eager = make("llama")
    both = [passes.Recompute(), passes.ChunkedLoss(tokens=9)]
    ours = surgery.apply(copy.deepcopy(eager), both[::-1] if order else both)
    inputs = inputs_of("llama", rows=4, length=64)
    assert_same(eager, ours, inputs)
    kept = [measure(lambda m=m: m(**inputs).loss, CPU).live for m in (eager, ours)]
    assert kept[1] < 0.52 * kept[0]


@pytest.mark.parametrize("value", [0, -1])
def test_chunks_of_no_tokens_are_refused(value):
    with pytest.raises(surgery.OptionError, match="at least 1"):
        passes.ChunkedLoss(tokens=value)
