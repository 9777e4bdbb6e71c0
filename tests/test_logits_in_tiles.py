"""Log-probabilities and normalizers in tiles of rows and classes, beside plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from test_logits import CLASSES, F, Plainly, lazy, parts, plain
from torch import Tensor

from surgery.kernels import plan
from surgery.logits import chains, tiles
from surgery.memory import measure

Make = Callable[[Tensor, dict[str, Tensor]], Tensor]


def picked(z: Tensor, p: dict[str, Tensor], dtype: torch.dtype | None = None) -> Tensor:
    return F.log_softmax(z, -1, dtype=dtype).gather(-1, p["labels"][..., None])


def several(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Three classes a row, one of them twice."""
    index = torch.stack([p["labels"], p["labels"], (p["labels"] + 5) % CLASSES], -1)
    return z.log_softmax(-1).gather(-1, index)


MAKES: dict[str, Make] = {
    "log-probabilities": picked,
    "in float32": lambda z, p: picked(z, p, torch.float32),
    "several classes": several,
    "with a temperature, soft-capped": lambda z, p: picked(torch.tanh(z.float() / 3) * 3 / 0.7, p),
    "normalizers": lambda z, p: z.logsumexp(-1),
    "each row's loss": lambda z, p: F.cross_entropy(
        z.reshape(-1, CLASSES), p["masked"].flatten(), reduction="none"
    ),
    "each row's likelihood": lambda z, p: F.nll_loss(
        F.log_softmax(z.reshape(-1, CLASSES), -1), p["masked"].flatten(), reduction="none"
    ),
    "selected minus normalizer": lambda z, p: (
        z.gather(-1, p["labels"][..., None]).squeeze(-1) - z.logsumexp(-1)
    ),
}


def both(name: str, dtype: torch.dtype, tokens: int | None = 4, bias: bool = True) -> list[Tensor]:
    """Return values and gradients, of plain tensors and of ours by turns."""
    found = []
    for make in (plain, lazy):
        p = parts(dtype)
        if not bias:
            p["bias"] = None  # pyright: ignore[reportArgumentType]
        value = MAKES[name](make(p) if make is plain else lazy(p, tokens), p)
        assert type(value) is Tensor
        weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(3))
        (value * weights.to(value.dtype)).sum().backward()
        grads = [p[key].grad for key in ("hidden", "weight", "bias")[: 2 + bias]]
        found.append([value.detach(), *grads])
    return [each for pair in zip(*found, strict=True) for each in pair]


@pytest.fixture
def ran(monkeypatch):
    """How often gradients were computed in tiles."""
    monkeypatch.setattr(chains, "_BODIES", {})  # other tests may have asked for too many
    calls, real = [], tiles.each_row_in_tiles
    monkeypatch.setattr(chains, "each_row_in_tiles", lambda *a: calls.append(1) or real(*a))
    return calls


@pytest.mark.parametrize("band", [4, 4096])
@pytest.mark.parametrize("name", MAKES)
def test_as_plain_tensors_to_nine_digits(name, band, monkeypatch, ran):
    monkeypatch.setattr(tiles, "_BAND", band)
    found = both(name, torch.float64)
    exact = name not in ("in float32", "with a temperature, soft-capped")
    for expected, got in zip(found[::2], found[1::2], strict=True):
        assert got.dtype == expected.dtype
        how = dict(rtol=1e-9, atol=1e-11) if exact else dict(rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got, expected, **how)
    assert ran


@pytest.mark.parametrize("form", ["cpu", "accelerator", "compiled"])
@pytest.mark.parametrize("name", MAKES)
def test_in_float32_gradients_are_within_a_millionth(name, form, ran):
    with plan.forced("cpu" if form == "cpu" else "accelerator", count=form == "accelerator"):
        found = both(name, torch.float32, bias=form != "cpu")
    for expected, got in zip(found[::2], found[1::2], strict=True):
        assert (got - expected).norm() <= 1e-6 * expected.norm()
    assert ran


@pytest.mark.parametrize("name", MAKES)
def test_weights_of_16_bits(name, monkeypatch, ran):
    """As far from the exact ones as plain tensors; sums over bands are in float32."""
    monkeypatch.setattr(tiles, "_BAND", 8)
    exact = both(name, torch.float64)[::2]
    found = both(name, torch.bfloat16)
    for true, expected, got in zip(exact, found[::2], found[1::2], strict=True):
        assert got.dtype == expected.dtype
        assert (got - true).norm() <= 1.5 * (expected - true).norm() + 1e-2 * true.norm()
    assert ran


def test_a_head_whose_hidden_states_alone_have_gradients_takes_two_products(ran):
    p = parts()
    for key in ("weight", "bias"):
        p[key].requires_grad_(False)
    picked(lazy(p), p).sum().backward()
    assert not ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_entry_is_that_of_the_logits_to_the_last_bit(dtype, ran):
    """Or ranks and masks would be off by one."""
    generator = torch.Generator().manual_seed(0)
    p = {
        name: torch.randn(*shape, generator=generator).to(dtype)
        for name, shape in {"hidden": (500, 64), "weight": (300, 64), "bias": (300,)}.items()
    }
    for t in p.values():
        t.requires_grad_()
    for z in (lazy(p, 64), lazy(p, 64) / 0.7):
        for wide in (z, z.log_softmax(-1)):
            third = wide.topk(3).indices[:, 2:]
            assert ((wide > wide.gather(-1, third)).sum(-1) <= 2).all()  # fewer: it has equals
            first = wide.gather(-1, wide.argmax(-1, keepdim=True))
            assert torch.equal(first, wide.amax(-1, keepdim=True))
            assert ((wide < wide.topk(1).values).sum(-1) < 300).all()
    assert ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_one_class_in_all_rows_add_up(dtype):
    """In float32: in 16 bits, a sum of as many numbers stops growing."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator).to(dtype) for n in (4000, 50))
    index, in_chunks = torch.zeros(4000, 1, dtype=torch.long), partial(lazy, tokens=256)
    found = []
    for kind, make in ((torch.float64, plain), (dtype, plain), (dtype, in_chunks)):
        p = {"hidden": hidden.to(kind), "weight": weight.to(kind), "bias": weight[:, 0].to(kind)}
        p = {name: t.detach().requires_grad_() for name, t in p.items()}
        z = make(p)
        log_p = z.gather(-1, index).squeeze(-1) - z.logsumexp(-1)
        (log_p.float().sum() + z.log_softmax(-1).gather(-1, index).float().sum()).backward()
        found.append([p[name].grad.double() for name in ("weight", "bias")])
    for exact, expected, got in zip(*found, strict=True):
        error = (got - exact).abs().max()
        assert error <= 3 * (expected - exact).abs().max() + 3e-6 * exact.abs().max()


def test_the_peak_is_that_of_the_gradients_and_a_tile():
    vocabulary, width, rows = 16_384, 64, 1024
    weight = torch.randn(vocabulary, width, requires_grad=True)
    hidden = torch.randn(rows, width, requires_grad=True)
    p = {"hidden": hidden, "weight": weight, "labels": torch.arange(rows), "bias": None}

    def peak(make: Callable[..., Tensor]) -> int:
        weight.grad = hidden.grad = None
        return measure(lambda: picked(make(p), p).sum().backward(), torch.device("cpu")).peak

    with Plainly():
        eager = peak(plain)
    assert peak(lambda p: lazy(p, 32)) <= eager / 8
