"""Logits that are not computed: what torch's functions make of them, beside plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from surgery.logits.factored import Factored, factored

ROWS, LENGTH, WIDTH, CLASSES = 3, 7, 8, 37
Make = Callable[[Tensor, dict[str, Tensor]], Any]


@pytest.fixture(autouse=True)
def nothing_whole(monkeypatch):
    """Whatever makes logits whole, however small, says so here, and warnings are errors."""
    monkeypatch.setattr("surgery.logits.factored._SAID", set())
    monkeypatch.setattr("surgery.logits.factored._LARGE", 0)


def parts(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(0, CLASSES, (ROWS, LENGTH), generator=generator)
    masked = labels.masked_fill(torch.rand(ROWS, LENGTH, generator=generator) < 0.6, -100)
    return {
        "hidden": draw(ROWS, LENGTH, WIDTH).requires_grad_(),
        "weight": draw(CLASSES, WIDTH).requires_grad_(),
        "bias": draw(CLASSES).requires_grad_(),
        "teacher": draw(ROWS, LENGTH, WIDTH),
        "teacher_weight": draw(CLASSES, WIDTH),
        "dense": draw(ROWS, LENGTH, CLASSES),
        "class_weight": draw(CLASSES).abs(),
        "column": draw(CLASSES).requires_grad_(),
        "scale": draw(ROWS, 1, 1).exp().requires_grad_(),
        "labels": labels,
        "masked": masked,
        "mask": masked != -100,
        "low": draw(ROWS, LENGTH, 2).requires_grad_(),
        "up": draw(CLASSES, 2).requires_grad_(),
    }


F = functional


def entropy(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    log_p = F.log_softmax(z, -1)
    return -(log_p.exp() * log_p).sum(-1)


def log_probabilities(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    return torch.gather(F.log_softmax(z, dim=-1), 2, p["labels"].unsqueeze(2)).squeeze(2)


def dpo(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    per_token = log_probabilities(z[:, :-1] / 0.7, {"labels": p["labels"][:, 1:]})
    chosen = (per_token * p["mask"][:, 1:]).sum(-1)
    return -F.logsigmoid(chosen[0] - chosen[1]) + chosen[2].square()


def teacher(p: dict[str, Tensor]) -> Tensor:
    return factored(p["teacher"], p["teacher_weight"])


def distilled(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    student, other = F.log_softmax(z / 2, -1), F.softmax(teacher(p) / 2, -1)
    return F.kl_div(student, other, reduction="batchmean")


def reverse(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    ours, theirs = F.log_softmax(z, -1), F.log_softmax(teacher(p), -1)
    return (ours.exp() * (ours - theirs)).sum(-1)[p["mask"]].mean()


def jensen_shannon(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    ours, theirs = F.log_softmax(z, -1), F.log_softmax(p["dense"], -1)
    middle = torch.logaddexp(ours, theirs) - 0.6931471805599453
    one = F.kl_div(middle, ours, reduction="none", log_target=True)
    other = F.kl_div(middle, theirs, reduction="none", log_target=True)
    return (0.5 * one + 0.5 * other).sum(-1)


def soft_capped(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    z = torch.tanh(z / 3.0) * 3.0
    return F.cross_entropy(z.view(-1, CLASSES), p["masked"].view(-1))


def flat(z: Tensor) -> Tensor:
    return z.reshape(-1, CLASSES)


MAKES: dict[str, Make] = {
    "cross entropy": lambda z, p: F.cross_entropy(flat(z), p["labels"].flatten()),
    "masked": lambda z, p: F.cross_entropy(flat(z.float()), p["masked"].flatten()),
    "summed": lambda z, p: F.cross_entropy(flat(z), p["masked"].flatten(), reduction="sum"),
    "each row": lambda z, p: F.cross_entropy(flat(z), p["masked"].flatten(), reduction="none"),
    "class weights": lambda z, p: F.cross_entropy(
        flat(z), p["masked"].flatten(), weight=p["class_weight"]
    ),
    "class weights, smoothed": lambda z, p: F.cross_entropy(
        flat(z), p["masked"].flatten(), weight=p["class_weight"], label_smoothing=0.1
    ),
    "smoothed": lambda z, p: F.cross_entropy(flat(z), p["masked"].flatten(), label_smoothing=0.3),
    "probabilities": lambda z, p: F.cross_entropy(flat(z), flat(p["dense"].softmax(-1))),
    "probabilities, each row": lambda z, p: F.cross_entropy(
        flat(z), flat(p["dense"].softmax(-1)), reduction="none", label_smoothing=0.2
    ),
    "a teacher's probabilities": lambda z, p: F.cross_entropy(
        flat(z), flat(teacher(p).softmax(-1))
    ),
    "classes second": lambda z, p: F.cross_entropy(z.transpose(1, 2), p["masked"]),
    "classes second, each row": lambda z, p: F.cross_entropy(
        z.permute(0, 2, 1), p["masked"], reduction="none"
    ),
    "classes second, log_softmax": lambda z, p: F.nll_loss(F.log_softmax(z.mT, dim=1), p["masked"]),
    "nll": lambda z, p: F.nll_loss(flat(z.log_softmax(-1)), p["masked"].flatten()),
    "nll with weights": lambda z, p: F.nll_loss(
        flat(z.log_softmax(-1)), p["masked"].flatten(), p["class_weight"]
    ),
    "z-loss": lambda z, p: (
        F.cross_entropy(flat(z), p["labels"].flatten()) + 1e-2 * z.logsumexp(-1).square().mean()
    ),
    "soft-capped": soft_capped,
    "log-probabilities": log_probabilities,
    "by index": lambda z, p: z.view(-1, CLASSES).log_softmax(-1)[
        torch.arange(ROWS * LENGTH), p["labels"].flatten()
    ],
    "take_along_dim": lambda z, p: torch.take_along_dim(
        z.log_softmax(-1), p["labels"][..., None].expand(-1, -1, 3), dim=-1
    ),
    "as TRL selects": lambda z, p: (
        torch.gather(z, -1, p["labels"][..., None]).squeeze(-1)
        - torch.stack([torch.logsumexp(row, dim=-1) for row in z])
    ),
    "row by row": lambda z, p: torch.stack(
        [
            F.log_softmax(row, dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            for row, labels in zip(z, p["labels"], strict=True)
        ]
    ),
    "DPO": dpo,
    "entropy": entropy,
    "KL to a teacher": distilled,
    "reverse KL": reverse,
    "Jensen-Shannon": jensen_shannon,
    "rows by a mask": lambda z, p: F.cross_entropy(z[p["mask"]], p["labels"][p["mask"]]),
    "last rows": lambda z, p: z[:, -3:, :].logsumexp(-1),
    "one of the batch": lambda z, p: z[1].logsumexp(-1),
    "dots": lambda z, p: z[..., 1:, :].logsumexp(dim=-1, keepdim=True),
    "split": lambda z, p: torch.cat([t.logsumexp(-1) for t in z.split(4, dim=1)], 1),
    "chunked": lambda z, p: torch.cat([t.sum(-1) for t in z.tanh().chunk(2, dim=0)], 0),
    "swapped rows": lambda z, p: z.transpose(0, 1).logsumexp(-1),
    "scaled by a tensor": lambda z, p: (z * p["scale"] + p["column"]).logsumexp(-1),
    "masked classes": lambda z, p: z.masked_fill(p["column"] > 0.5, -1e4).logsumexp(-1),
    "where": lambda z, p: torch.where(p["dense"] > 0, z, -5.0).logsumexp(-1),
    "a shifted head": lambda z, p: (2 - z).exp().mean(),
    "sum of all": lambda z, p: z.sigmoid().sum(),
    "mean squares": lambda z, p: F.mse_loss(z, p["dense"]),
    "to a teacher": lambda z, p: F.mse_loss(z, teacher(p), reduction="sum"),
    "many labels": lambda z, p: F.binary_cross_entropy_with_logits(z, (p["dense"] > 1).double()),
    "two at once": lambda z, p: (z + factored(p["low"], p["up"]) * 0.5).logsumexp(-1),
    "largest": lambda z, p: z.max(dim=-1).values,
    "largest few": lambda z, p: z.topk(3, dim=-1).values.sum(-1),
    "in place": lambda z, p: z.div_(0.7).logsumexp(-1),
    "in place, by an operator": lambda z, p: divided(z).logsumexp(-1),
    "amax": lambda z, p: z.amax(-1),
    "repeated": lambda z, p: (z - z.logsumexp(-1, keepdim=True)).square().mean(),
    "joined": lambda z, p: torch.cat([z[:1], z[1:]]).logsumexp(-1),
}
INTEGERS: dict[str, Make] = {
    "argmax": lambda z, p: z.argmax(-1),
    "argmax, kept": lambda z, p: z.argmax(dim=-1, keepdim=True),
    "accuracy": lambda z, p: (z[:, :-1].argmax(-1) == p["labels"][:, 1:]).double().mean(),
    "topk": lambda z, p: z.topk(4).indices,
    "comparison": lambda z, p: (z > p["dense"]).sum(-1),
    "how many": lambda z, p: (z > 0).sum(),
    "finite": lambda z, p: torch.isfinite(z).all(),
    "max": lambda z, p: torch.max(z, -1).indices,
    "shape": lambda z, p: torch.tensor([*z.shape, z.ndim, z.size(-1), len(z), z.numel()]),
}


AUTOCAST = ["masked", "each row", "log-probabilities", "entropy", "KL to a teacher"]


def divided(z: Tensor) -> Tensor:
    z /= 0.7
    return z


def plain(p: dict[str, Tensor]) -> Tensor:
    return F.linear(p["hidden"], p["weight"], p["bias"])


def lazy(p: dict[str, Tensor], tokens: int | None = 4) -> Factored:
    return factored(p["hidden"], p["weight"], p["bias"], tokens)


class Plainly:
    """`factored` that computes, for the reference."""

    def __enter__(self) -> None:
        globals()["factored"] = lambda h, w, b=None, tokens=None: F.linear(h, w, b)

    def __exit__(self, *_: Any) -> None:
        globals()["factored"] = _FACTORED


_FACTORED = factored


def slopes(value: Tensor, p: dict[str, Tensor]) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(value.shape, generator=generator, dtype=value.dtype)
    (value * weights).sum().backward()
    return {name: t.grad for name, t in p.items() if t.requires_grad}


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen head"])
@pytest.mark.parametrize("name", MAKES)
def test_values_and_gradients_are_those_of_plain_tensors(name, frozen):
    one, other = parts(), parts()
    for p in (one, other):
        for key in ("weight", "bias", "up") if frozen else ():
            p[key].requires_grad_(False)
    with Plainly():
        expected = MAKES[name](plain(one), one)
    found = MAKES[name](lazy(other), other)
    assert type(found) is Tensor and found.dtype == expected.dtype
    tolerance = dict(rtol=1e-9, atol=1e-11) if expected.dtype == torch.float64 else {}
    torch.testing.assert_close(found, expected, **tolerance)
    wanted, got = slopes(expected, one), slopes(found, other)
    for key, grad in wanted.items():
        if grad is None:
            assert got[key] is None or not got[key].any(), key
        else:
            torch.testing.assert_close(got[key], grad, **tolerance)


@pytest.mark.parametrize("name", [*MAKES, *INTEGERS])
def test_values_without_gradients(name):
    make = (MAKES | INTEGERS)[name]
    with torch.no_grad():
        with Plainly():
            expected = make(plain(parts()), parts())
        torch.testing.assert_close(make(lazy(parts()), parts()), expected)


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_with_gradients_on(name):
    expected = INTEGERS[name](plain(parts()), parts())
    assert torch.equal(INTEGERS[name](lazy(parts()), parts()), expected)


@pytest.mark.parametrize("inside", [True, False], ids=["loss inside", "loss outside"])
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_is_that_of_plain_tensors(name, inside):
    found = []
    for make in (plain, lazy):
        p = parts(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = make(p)
            assert z.dtype == torch.bfloat16
            value = MAKES[name](z, p) if inside else None
        value = MAKES[name](z, p) if value is None else value
        found.append((value, slopes(value, p)))
    (expected, wanted), (value, got) = found
    assert value.dtype == expected.dtype
    torch.testing.assert_close(value, expected, rtol=2e-2, atol=2e-2)
    for key in ("hidden", "weight", "bias"):
        assert got[key].dtype == wanted[key].dtype
        assert (got[key] - wanted[key]).norm() <= 3e-2 * wanted[key].norm()
