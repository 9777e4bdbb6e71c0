"""Logits that are not computed are a torch.Tensor: what others see of them, and what they cost."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from test_logits import (
    CLASSES,
    LENGTH,
    MAKES,
    ROWS,
    WIDTH,
    dpo,
    flat,
    lazy,
    parts,
    plain,
    slopes,
)
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import surgery
from surgery.logits.factored import factored


def test_it_is_a_tensor_with_a_shape_and_no_memory():
    z = lazy(parts(torch.float32))
    assert isinstance(z, Tensor) and z.shape == (ROWS, LENGTH, CLASSES) and z.ndim == 3
    assert z.dtype == torch.float32 and z.device.type == "cpu" and z.numel() == z.shape.numel()
    assert z.requires_grad and z.grad_fn is not None and not z.is_leaf
    assert z.half().dtype == torch.float16 and z.to(torch.float64).dtype == torch.float64
    assert z.to("cpu") is z and z.float() is not None and not z.detach().requires_grad
    assert len(z[0]) == LENGTH and [t.shape for t in z] == [(LENGTH, CLASSES)] * ROWS
    with torch.no_grad():
        assert not lazy(parts()).requires_grad


def test_copies_and_prints_are_of_plain_tensors():
    p = parts()
    z, expected = lazy(p).detach(), plain(p).detach()
    assert repr(z) == repr(expected)
    again = pickle.loads(pickle.dumps(z))
    assert type(again) is Tensor and torch.allclose(again, expected)
    assert torch.allclose(copy.deepcopy(z), expected)


def test_what_is_not_known_makes_it_whole_and_says_so_once(monkeypatch):
    monkeypatch.setattr("surgery.logits.factored._SAID", set())
    monkeypatch.setattr("surgery.logits.factored._LARGE", 0)
    one, other = parts(), parts()
    z = lazy(other)
    with pytest.warns(UserWarning, match=r"cumsum needs all .*\(3, 7, 37\), 0.0 MB"):
        found = z.cumsum(-1)
    torch.testing.assert_close(found, plain(one).cumsum(-1))
    found = found.sum() + z.cumsum(-1).square().sum()  # a plain tensor by now: nothing more is said
    expected = plain(one).cumsum(-1).sum() + plain(one).cumsum(-1).square().sum()
    wanted, got = slopes(expected, one), slopes(found, other)
    for key in ("hidden", "weight", "bias"):
        torch.testing.assert_close(got[key], wanted[key])


def test_hooks_on_logits_are_called(monkeypatch):
    monkeypatch.setattr("surgery.logits.factored._LARGE", 1 << 40)
    p, seen = parts(), []
    z = lazy(p)
    z.register_hook(seen.append)
    F.cross_entropy(flat(z), p["labels"].flatten()).backward()
    q = parts()
    reference = plain(q)
    reference.retain_grad()
    F.cross_entropy(flat(reference), q["labels"].flatten()).backward()
    torch.testing.assert_close(seen[0], reference.grad)
    torch.testing.assert_close(p["hidden"].grad, q["hidden"].grad)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


@pytest.mark.parametrize("make", [lambda z: z, lambda z: z[:, 1:].float() / 3, lambda z: z.mT])
def test_functions_of_others_get_their_gradient(make, monkeypatch):
    monkeypatch.setattr("surgery.logits.factored._LARGE", 1 << 40)
    one, other = parts(), parts()
    expected, found = Doubled.apply(make(plain(one))), Doubled.apply(make(lazy(other)))
    torch.testing.assert_close(found, expected)
    wanted, got = slopes(expected, one), slopes(found, other)
    for key in ("hidden", "weight", "bias"):
        torch.testing.assert_close(got[key], wanted[key])


def test_a_change_through_a_view_is_not_lost():
    z = lazy(parts())
    view = z[:, 1:]
    view.div_(2.0)
    with pytest.raises(surgery.SurgeryError, match=r"through a view.*logits\[:, :-1\] / t"):
        z.logsumexp(-1)
    assert view.logsumexp(-1).shape == (ROWS, LENGTH - 1)


def test_writing_entries_is_that_of_plain_tensors():
    one, other = parts(), parts()
    expected, found = plain(one), lazy(other)
    for z in (expected, found):
        z[..., 3] = -torch.inf
    a, b = expected.logsumexp(-1), found.logsumexp(-1)
    torch.testing.assert_close(b, a)
    wanted, got = slopes(a, one), slopes(b, other)
    torch.testing.assert_close(got["weight"], wanted["weight"])


@pytest.mark.parametrize("name", ["cross entropy", "nll"])
@pytest.mark.parametrize("wrong", [CLASSES, -1])
def test_targets_out_of_range_are_named_before_anything_is_computed(name, wrong):
    p = parts()
    p["labels"][1, 2] = p["masked"][1, 2] = wrong
    with pytest.raises(surgery.SurgeryError, match=f"a target is {wrong}, but the logits have 37"):
        MAKES[name](lazy(p), p)
    assert p["hidden"].grad is None


def test_targets_of_another_shape_are_named():
    p = parts()
    with pytest.raises(surgery.SurgeryError, match=r"shape \(18,\), but the logits are \(21,\)"):
        F.cross_entropy(flat(lazy(p)), p["labels"][:, 1:].flatten())


@pytest.mark.parametrize("name", ["cross entropy", "class weights", "each row", "entropy"])
def test_second_derivatives_are_refused(name):
    p = parts()
    value = MAKES[name](lazy(p), p).sum()
    with pytest.raises(surgery.SurgeryError, match=r"chunked_loss.*create_graph"):
        torch.autograd.grad(value, p["hidden"], create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_target_at_all_is_as_in_eager(reduction, weighted):
    found = []
    for make in (plain, lazy):
        p = parts()
        weight = p["class_weight"] if weighted else None
        loss = F.cross_entropy(
            flat(make(p)), torch.full((ROWS * LENGTH,), -100), weight, reduction=reduction
        )
        loss.sum().backward()
        found.append((loss, p["hidden"].grad, p["weight"].grad))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0].rstrip("_")
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.numbers += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "forwards"),
    [("masked", 1), ("each row", 2), ("log-probabilities", 2), ("KL to a teacher", 1)],
)
def test_what_is_computed(name, forwards):
    """Three products for a loss, of the rows with a target; one more where its slopes come late."""
    p = parts(torch.float32)
    rows = int(p["mask"].sum()) if name in ("masked", "each row") else ROWS * LENGTH
    z = lazy(p)
    with Products() as found:
        MAKES[name](z, p).sum().backward()
    teachers = 1 if name == "KL to a teacher" else 0
    assert found.numbers == (forwards + 2 + teachers) * rows * WIDTH * CLASSES


@pytest.mark.parametrize("name", ["log-probabilities", "entropy", "each row"])
def test_a_frozen_head_is_computed_once(name):
    p = parts(torch.float32)
    for key in ("weight", "bias"):
        p[key].requires_grad_(False)
    rows = int(p["mask"].sum()) if name == "each row" else ROWS * LENGTH
    z = lazy(p)
    with Products() as found:
        MAKES[name](z, p).sum().backward()
    assert found.numbers == 2 * rows * WIDTH * CLASSES


def test_nothing_of_a_chunk_lives_on():
    p = parts(torch.float32)
    gc.collect()
    before = live()
    loss = dpo(lazy(p), p)
    loss.backward()
    del loss
    p["hidden"].grad = p["weight"].grad = p["bias"].grad = None
    assert live() == before


def live() -> int:
    return sum(isinstance(each, Tensor) for each in gc.get_objects())


@pytest.mark.parametrize("name", ["log-probabilities", "entropy", "each row"])
def test_what_is_kept_for_backward_is_autograds_to_keep(name):
    """Whatever packs or moves saved tensors sees all of them, and then they go; see design.md 9."""
    p, q = parts(torch.float32), parts(torch.float32)
    made = p["hidden"] * 1
    gone = weakref.ref(made)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        value = MAKES[name](factored(made, p["weight"], p["bias"], 4), p)
    del made
    gc.collect()
    assert gone() is None
    wanted, got = slopes(MAKES[name](plain(q), q), q), slopes(value, p)
    for key in ("hidden", "weight", "bias"):
        torch.testing.assert_close(got[key], wanted[key])
