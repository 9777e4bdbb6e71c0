"""Calls on logits that are not computed which torch refuses, or takes in its own way."""

from __future__ import annotations

import pytest
import torch
from test_logits import CLASSES, LENGTH, ROWS, F, lazy, parts, plain
from torch import Tensor, nn

import surgery

INDEX = torch.full((ROWS, LENGTH, 1), -1)


def flat(z: Tensor) -> Tensor:
    return z.reshape(-1, CLASSES)


def test_indices_that_count_from_the_end():
    p = parts()
    for read in (
        lambda z: torch.take_along_dim(z, INDEX, -1),
        lambda z: flat(z)[torch.arange(ROWS * LENGTH), torch.full((ROWS * LENGTH,), -2)],
    ):
        torch.testing.assert_close(read(lazy(p)), read(plain(p)))
    with pytest.raises(surgery.SurgeryError, match=r"index is -38, but the logits have 37 classes"):
        torch.take_along_dim(lazy(p), INDEX - CLASSES, -1)
    with pytest.raises(surgery.SurgeryError, match=r"index is -1, .*, 0 to 36\. Clamp"):
        lazy(p).gather(-1, INDEX)
    with pytest.raises(surgery.SurgeryError, match=r"target is 37, .*ignore_index"):
        F.cross_entropy(flat(lazy(p)), torch.full((ROWS * LENGTH,), CLASSES))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_targets_that_are_no_long_integers(dtype):
    p = parts()
    target = p["labels"].flatten()
    small = target.to(torch.uint8)
    for loss in (F.cross_entropy, lambda z, y: F.nll_loss(F.log_softmax(z, -1), y)):
        torch.testing.assert_close(loss(flat(lazy(p)), small), loss(flat(plain(p)), small))
        with pytest.raises(surgery.SurgeryError, match=r"must be torch.int64: labels.long\(\)"):
            loss(flat(lazy(p)), target.to(dtype))


def test_smoothing_outside_of_its_range():
    p = parts()
    target = p["labels"].flatten()
    with pytest.raises(surgery.SurgeryError, match=r"label_smoothing=2.0 must be between 0 and 1"):
        F.cross_entropy(flat(lazy(p)), target, label_smoothing=2.0)
    found = [F.cross_entropy(flat(m(p)), target, label_smoothing=-0.1) for m in (lazy, plain)]
    torch.testing.assert_close(*found)


def test_types():
    p = parts(torch.float32)
    assert lazy(p).type() == plain(p).type() == "torch.FloatTensor"
    assert lazy(p).type("torch.DoubleTensor").dtype == torch.float64
    assert lazy(p).type(torch.bfloat16).dtype == torch.bfloat16


def test_what_comes_of_comparisons_has_no_gradient():
    p = parts()
    for make in (plain, lazy):
        z = make(p)
        accuracy = (z.argmax(-1) == p["labels"]).float().mean()
        assert not (z > 0).float().mean().requires_grad and not accuracy.requires_grad
        assert (z * (z > 0)).mean().requires_grad


@pytest.mark.parametrize("mean", ["mean", "mse"])
def test_means_of_float16_do_not_overflow(mean):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).half() for n in (800, 300))
    found = []
    for make in (plain, lazy):
        p = {"hidden": hidden.clone().requires_grad_(), "weight": weight / 4, "bias": None}
        z = make(p)  # pyright: ignore[reportArgumentType]
        value = (z * z).mean() if mean == "mean" else F.mse_loss(z, torch.zeros(800, 300).half())
        value.backward()
        found += [value, p["hidden"].grad]
    assert found[2].isfinite() and found[2].dtype == torch.float16
    torch.testing.assert_close(found[2], found[0], rtol=2e-3, atol=0)
    torch.testing.assert_close(found[3], found[1], rtol=2e-2, atol=1e-6)


def test_hooks_come_before_what_they_would_miss():
    p = parts()
    z = lazy(p)
    part = z[:, :-1]
    for add in (lambda: z.register_hook(lambda g: g * 0), z.retain_grad):
        with pytest.raises(surgery.SurgeryError, match=r"before anything is computed of them"):
            add()
    assert part.logsumexp(-1).requires_grad


def test_weights_that_get_another_memory_are_seen():
    p = parts(torch.float32)
    weight = nn.Parameter(p["weight"].detach().clone())
    for change in (
        lambda: setattr(weight, "data", weight.data * 2),
        lambda: nn.utils.vector_to_parameters(
            nn.utils.parameters_to_vector([weight]) * 2, [weight]
        ),
    ):
        z = lazy(p | {"weight": weight})
        change()
        with pytest.raises(surgery.SurgeryError, match=r"head's weight .* was changed in place"):
            z.logsumexp(-1)
