"""Logits that are not computed yet: what changes meanwhile, what has no gradient, and spellings."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from test_logits import LENGTH, ROWS, Make, flat, lazy, parts, plain, slopes
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import surgery
from surgery.logits import chains
from surgery.logits.factored import factored


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0]


def without(make: Make) -> Make:
    """Run a function under no_grad, which is seen in logsumexp."""

    def made(z: Tensor, p: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            found: Any = make(z, p)
        return (found if isinstance(found, Tensor) else z).logsumexp(-1) + z.logsumexp(-1)

    return made


def write(z: Tensor, p: dict[str, Tensor]) -> None:
    z[..., 3] = -9.0


def alias(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    z.double().div_(2.0)
    return z.logsumexp(-1)


def counted(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    return (z > p["dense"]).double().sum(-1) + z.sum(-1)


def chosen(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    return torch.where(z > 0, p["dense"] * p["scale"], p["column"]).logsumexp(-1) + z.sum(-1)


def numbers(p: dict[str, Tensor]) -> Tensor:
    return p["labels"].flatten() % 4


def into(func: Any, out: Tensor) -> Make:
    def made(z: Tensor, p: dict[str, Tensor]) -> Tensor:
        func(z.detach(), -1, out=out)
        return out.double() + z.sum(-1)

    return made


MAKES: dict[str, Make] = {
    "a part without gradients": lambda z, p: (
        without(lambda z, p: z * 2.0)(z, p)[..., None] * z.log_softmax(-1)
    ).sum(-1),
    "a view without gradients": without(lambda z, p: z[:, :, :]),
    "in place without gradients": without(lambda z, p: z.div_(2.0)),
    "in place, unknown, without gradients": without(lambda z, p: z.clamp_min_(0.3)),
    "an entry without gradients": without(write),
    "float is the same tensor": alias,
    "unknown in place": lambda z, p: z.pow_(2.0).logsumexp(-1),
    "a comparison": counted,
    "a comparison alone": lambda z, p: (z > 0).double().mean() + z.mean(),
    "a condition": chosen,
    "where without values": lambda z, p: torch.where(z > 0)[0].double().sum() + z.sum(),
    "ignoring class 0": lambda z, p: F.cross_entropy(flat(z), numbers(p), ignore_index=0),
    "ignoring class 0, smoothed": lambda z, p: F.cross_entropy(
        flat(z), numbers(p), ignore_index=0, label_smoothing=0.2, reduction="sum"
    ),
    "ignoring class 2, weighted": lambda z, p: F.cross_entropy(
        flat(z), numbers(p), p["class_weight"], ignore_index=2, label_smoothing=0.2
    ),
    "smallest few": lambda z, p: z.topk(3, -1, False).values,
    "kthvalue": lambda z, p: z.kthvalue(3, -1, True).values,
    "maximum of two": lambda z, p: torch.max(z, other=p["dense"]).logsumexp(-1),
    "axis": lambda z, p: z.max(axis=-1, keepdims=True).values,  # pyright: ignore[reportCallIssue]
    "any by axis": lambda z, p: (z > 2).any(axis=-1).double() + z.sum(axis=-1),  # pyright: ignore
    "input": lambda z, p: torch.gather(
        input=torch.softmax(input=z, dim=-1), dim=-1, index=p["labels"][..., None]
    ),
    "a list by name": lambda z, p: torch.cat(tensors=[z, z], dim=1).logsumexp(-1),
    "dims by name": lambda z, p: z.permute(dims=(1, 0, 2)).logsumexp(-1),
    "transposed by name": lambda z, p: z.transpose(dim0=1, dim1=2).logsumexp(1),
    "sum into": into(torch.sum, torch.empty(ROWS, LENGTH, dtype=torch.float64)),
    "argmax into": into(torch.argmax, torch.empty(ROWS, LENGTH, dtype=torch.long)),
    "a new last dimension": lambda z, p: z[..., None].sum((-1, -2)),
    "a mask of numpy": lambda z, p: z[p["mask"].numpy()].logsumexp(-1),
    "a whole mask of numpy": lambda z, p: z[(p["dense"] > 0).numpy()],
    "classes from the end": lambda z, p: flat(z)[torch.arange(ROWS * LENGTH), -1 - numbers(p)],
    "one row, by index": lambda z, p: z[0, 0][torch.tensor([1, 4, -2])],
    "one row, batchmean": lambda z, p: F.kl_div(
        z[0, 0].log_softmax(-1), p["dense"][0, 0].softmax(-1), reduction="batchmean"
    ),
    "one row, probabilities": lambda z, p: F.cross_entropy(z[0, 0], p["dense"][0, 0].softmax(-1)),
    "weighted squares": lambda z, p: F.mse_loss(
        z,
        p["dense"],
        weight=p["dense"].abs(),  # pyright: ignore[reportCallIssue]
    ),
    "squares, each": lambda z, p: F.mse_loss(z, p["dense"], reduce=False).sum(-1),
    "mean of nothing": lambda z, p: z[:0].mean(),
    "a Function of others": lambda z, p: Reversed.apply(z[:, 1:]).logsumexp(-1),
    "a Function, transposed": lambda z, p: Reversed.apply(z.mT).mT.logsumexp(-1),
    "checkpointed": lambda z, p: checkpoint(
        lambda x: x.log_softmax(-1).sum(-1) + x.square().mean(-1), z, use_reentrant=True
    ),
    "a checkpoint's logits": lambda z, p: checkpoint(
        lambda x: x / 3, z, use_reentrant=True
    ).logsumexp(-1),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen head"])
@pytest.mark.parametrize("name", MAKES)
def test_values_and_gradients_are_those_of_plain_tensors(name, frozen):
    found = []
    for make in (plain, lazy):
        p = parts()
        for key in ("weight", "bias") if frozen else ():
            p[key].requires_grad_(False)
        value = MAKES[name](make(p), p)
        found.append((value, slopes(value, p)))
    (expected, wanted), (value, got) = found
    assert value.dtype == expected.dtype
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11, equal_nan=True)
    for key, grad in wanted.items():
        if grad is None:
            assert got[key] is None or not got[key].any(), key
        else:
            torch.testing.assert_close(got[key], grad, rtol=1e-9, atol=1e-11)


def test_a_temperature_of_its_own_tensor_leaves_logits_alone():
    p = parts()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = type(lazy(p) / p["scale"][0, 0, 0])
    assert found is type(lazy(p))


@pytest.mark.parametrize(
    "read",
    [
        lambda z, p: z.logsumexp(-1),
        lambda z, p: F.cross_entropy(flat(z), p["labels"].flatten()),
        lambda z, p: z[:, 1:],
        repr,
    ],
)
@pytest.mark.parametrize(
    ("changed", "what"),
    [("weight", "head's weight"), ("bias", "head's bias"), ("hidden", "hidden states")],
)
def test_a_step_before_logits_are_computed_is_an_error(changed, what, read):
    p = parts()
    old = lazy(p).detach()
    with torch.no_grad():
        p[changed].mul_(2.0)
    with pytest.raises(surgery.SurgeryError, match=rf"{what}.*optimizer.step.*no_grad\(\)"):
        read(old) if read is repr else read(old, p)


@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_steps_of_fused_optimizers_are_seen(fused, detached):
    p = parts(torch.float32)
    weight = torch.nn.Parameter(p["weight"].detach())
    optimizer = torch.optim.AdamW([weight], fused=fused)
    z = factored(p["hidden"], weight)
    old = z.detach()[:, 1:] if detached else z[:, 1:]
    z.logsumexp(-1).sum().backward()
    old.logsumexp(-1)
    optimizer.step()
    with pytest.raises(surgery.SurgeryError, match=r"head's weight.*optimizer.step"):
        old.logsumexp(-1)
    factored(p["hidden"], weight).logsumexp(-1)


def test_a_mask_that_changes_before_logits_are_computed_is_an_error():
    p = parts()
    mask = torch.ones(ROWS, LENGTH, 1, dtype=torch.float64)
    z = lazy(p) * mask
    mask.zero_()
    with pytest.raises(surgery.SurgeryError, match=r"combined with them.*changed in place"):
        z.logsumexp(-1)


@pytest.mark.parametrize("order", ["whole first", "view first"])
def test_changes_of_logits_that_became_whole_are_seen_by_views(order):
    z = lazy(parts())
    view = z[:, 1:]
    z.cumsum(-1)
    changed, other = (z, view) if order == "whole first" else (view, z)
    changed.div_(2.0)
    with pytest.raises(surgery.SurgeryError, match="through a view"):
        other.logsumexp(-1)


def test_temperatures_that_change_leave_nothing_behind(monkeypatch):
    monkeypatch.setattr(chains, "_BODIES", {})
    for step in range(100):
        p, q = parts(), parts()
        temperature = 1 + step / 1e3
        loss = F.cross_entropy(flat(lazy(p)) / temperature, p["labels"].flatten())
        expected = F.cross_entropy(flat(plain(q)) / temperature, q["labels"].flatten())
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-11)
    assert len(chains._BODIES) <= 32


@pytest.mark.parametrize("autocast", [True, False])
def test_float16_under_a_scale_keeps_small_gradients(autocast):
    """Of 2,048 rows and 4,000 classes: slopes and 1 / count together lie below float16."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2048, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(4000, 16, generator=generator, dtype=torch.float64) / 4
    labels = torch.randint(0, 4000, (2048,), generator=generator)
    errors = []
    kind = torch.float32 if autocast else torch.float16
    for make, dtype in ((F.linear, torch.float64), (F.linear, kind), (factored, kind)):
        own = [t.to(dtype, copy=True).requires_grad_() for t in (hidden, weight)]
        with torch.autocast("cpu", torch.float16, enabled=autocast and dtype == kind):
            loss = F.cross_entropy(make(*own).to(torch.promote_types(dtype, torch.float32)), labels)
        (loss * 65536).backward()
        errors.append([t.grad.double() for t in own])
    exact, eager, ours = errors
    for a, b, c in zip(exact, eager, ours, strict=True):
        assert (c - a).norm() <= 1.5 * (b - a).norm()
