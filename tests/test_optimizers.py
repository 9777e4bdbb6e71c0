"""Optimizers of other packages: the clock hears them; their state is freed, saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from laws import PASSES, Moved, own, state_of, weights
from models import inputs_of, loss_of, make

import passes
import surgery
from passes.galore import Frame
from surgery.testing import Tiny


def bitsandbytes(parameters: Any) -> Any:
    found = pytest.importorskip("bitsandbytes")
    return found.optim.AdamW8bit(parameters, lr=1e-2, min_8bit_size=1)


def schedulefree(parameters: Any) -> Any:
    optimizer = pytest.importorskip("schedulefree").AdamWScheduleFree(parameters, lr=1e-2)
    optimizer.train()
    return optimizer


def came(parameters: Any) -> Any:
    return pytest.importorskip("came_pytorch.CAME").CAME(parameters, lr=1e-2)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "bitsandbytes 8-bit": bitsandbytes,
    "schedulefree": schedulefree,
    "CAME": came,
    "torch Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
    "torch NAdam": lambda parameters: torch.optim.NAdam(parameters, lr=1e-2),
    "torch Muon": lambda parameters: torch.optim.Muon(
        [p for p in parameters if p.ndim == 2], lr=1e-2
    ),
}
CASES = [(kind, row) for kind in OPTIMIZERS for row in ("misa", "rso", "galore", "badam")]
CASES += [("bitsandbytes 8-bit", row) for row in ("lisa", "velora_redrawn")]
CASES.remove(("torch Muon", "badam"))  # it takes matrices only, and blocks have vectors

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def steps(model, optimizer, numbers) -> None:
    for seed in numbers:
        loss_of(model, inputs_of("plain", seed=seed)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("kind", "row"), CASES)
def test_rounds_state_and_resume(kind, row, tmp_path):
    model = surgery.apply(make("plain"), PASSES[row](period=2))
    optimizer = OPTIMIZERS[kind](model.parameters())
    moved = Moved(model, optimizer)
    optimizer.register_step_post_hook(moved.move)
    for step in range(5):
        active = {c.weight for c in surgery.coordinates(model) if c.active}
        before = weights(model)
        steps(model, optimizer, [step])
        for name, parameter in own(model).items():
            torch.testing.assert_close(parameter.detach(), moved.weights[name], msg=name)
            assert torch.equal(parameter, before[name]) == (name not in active), (name, step)
        live = {id(c.parameter) for c in surgery.coordinates(model) if c.active}
        assert {id(p) for p, state in optimizer.state.items() if state} <= live
    assert state_of(model).clock.step == 5
    surgery.save(model, tmp_path, optimizer)
    again = surgery.apply(make("plain", seed=5), PASSES[row](period=2))
    other = OPTIMIZERS[kind](again.parameters())
    surgery.load(again, tmp_path, other)
    for each in ((model, optimizer), (again, other)):
        steps(*each, range(5, 9))
    for name, parameter in own(model).items():
        assert torch.equal(parameter, own(again)[name]), name


@pytest.mark.parametrize("row", ["recompute", "chunked_loss", "compress"])
@pytest.mark.parametrize("kind", ["bitsandbytes 8-bit", "schedulefree"])
def test_passes_without_coordinates_do_not_mind_the_optimizer(kind, row):
    start, plain, ours = (make("plain") for _ in range(3))
    surgery.apply(ours, PASSES[row]())
    for model in (plain, ours):
        steps(model, OPTIMIZERS[kind](model.parameters()), range(3))
    bound = 0.5 if row == "compress" else 1e-3  # what rounding at random turns is small entries
    for name, parameter in plain.named_parameters():
        moved = (parameter - start.get_parameter(name)).norm()
        assert (ours.get_parameter(name) - parameter).norm() < bound * moved, name


class Elsewhere:
    """An optimizer that is no torch.optim.Optimizer: sign descent."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups = [{"params": list(parameters), "lr": 1e-3}]
        self.state: dict[Any, Any] = {}

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p -= 1e-3 * p.grad.sign()


@pytest.mark.parametrize("row", ["misa", "rso"])
def test_an_optimizer_outside_torch(row):
    model = surgery.apply(make("plain"), PASSES[row](period=2))
    optimizer = Elsewhere(model.parameters())
    before = weights(model)
    for seed in range(4):
        loss_of(model, inputs_of("plain", seed=seed)).backward()
        surgery.step(model, optimizer)
        model.zero_grad()
    assert state_of(model).clock.step == 4
    assert any(not torch.equal(p, before[n]) for n, p in own(model).items())


def fused_beside(plain, ours, reference, fused) -> None:
    """Five steps that are made inside of backward, beside those of a reference."""
    for seed in range(5):
        loss_of(plain, inputs_of("plain", seed=seed)).backward()
        reference.step()
        reference.zero_grad()
        loss = loss_of(ours, inputs_of("plain", seed=seed))
        surgery.step(ours, fused, lambda loss=loss: fused.fused_backward(loss, 1e-2))
        for name, parameter in own(ours).items():
            torch.testing.assert_close(parameter, own(plain)[name], msg=f"{name} {seed}")
        active = [[c.active for c in surgery.coordinates(model)] for model in (plain, ours)]
        assert active[0] == active[1]
    assert state_of(ours).clock.step == 5


@pytest.mark.parametrize("row", ["misa", "badam", "rso", "velora", "galore"])
def test_lomo_steps_inside_of_backward(row):
    """It is SGD, and takes each gradient away as soon as the next one is there."""
    lomo = pytest.importorskip("lomo_optim").Lomo
    spec = PASSES[row](period=2)
    plain, ours = (surgery.apply(make("plain"), spec) for _ in range(2))
    sgd = torch.optim.SGD(plain.parameters(), lr=1e-2)
    fused_beside(plain, ours, sgd, lomo(ours, lr=1e-2))


class Factored(torch.optim.Optimizer):
    """AdaLomo (2310.10195, algorithm 1), in a step of its own."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.count, self.held = 0, {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.count += 1
        keep = 1.0 - self.count**-0.8
        for p in self.param_groups[0]["params"]:
            if p.grad is None:
                continue
            square = p.grad.square() + 1e-30
            kinds = [square.mean(1), square.mean(0)] if p.ndim == 2 else [square]
            held = self.held.get(id(p), [torch.zeros_like(each) for each in kinds])
            self.held[id(p)] = held = [
                keep * old + (1 - keep) * new for old, new in zip(held, kinds, strict=True)
            ]
            if p.ndim == 2:
                second = torch.outer(held[0], held[1]) / held[0].mean()
            else:
                (second,) = held
            update = p.grad / second.sqrt()
            update /= update.square().mean().sqrt().clamp(min=1.0)
            size = p.square().mean().sqrt().clamp(min=1e-3)
            p -= self.param_groups[0]["lr"] * size * update


@pytest.mark.parametrize("row", ["misa", "lisa", "badam", "rso", "galore", "velora"])
def test_adalomo_steps_inside_of_backward(row, monkeypatch):
    """Its factors lie in lists of its own, by name: those of a round that has ended stay."""
    adalomo = pytest.importorskip("lomo_optim").AdaLomo
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_: self)  # it puts its state there
    plain, ours = (surgery.apply(make("plain"), PASSES[row](period=2)) for _ in range(2))
    before = weights(ours)
    fused_beside(plain, ours, Factored(plain.parameters(), lr=1e-2), adalomo(ours, lr=1e-2))
    assert any(not torch.equal(p, before[n]) for n, p in own(ours).items())


def test_gradients_that_vanish_within_backward_are_told():
    lomo = pytest.importorskip("lomo_optim").Lomo
    model = surgery.apply(make("plain"), "rso", rank=4)
    optimizer = lomo(model, lr=1e-2)
    loss = loss_of(model, inputs_of("plain"))
    with pytest.raises(surgery.OptimizerError, match=r"surgery\.step\(model, optimizer, lambda"):
        optimizer.fused_backward(loss, 1e-2)


def test_optimizers_that_step_inside_of_backward_are_told():
    """The recipe of torch's tutorial: one optimizer for each parameter, stepped by its hook."""
    model = surgery.apply(make("plain"), "badam")
    each = {p: torch.optim.SGD([p], lr=1e-2) for p in model.parameters()}
    before = weights(model)
    for c in surgery.coordinates(model):
        parameter, optimizer = c.parameter, each[c.parameter]
        parameter.register_post_accumulate_grad_hook(lambda _, own=optimizer: own.step())
    with pytest.raises(surgery.OptimizerError, match="SGD steps inside of backward"):
        loss_of(model, inputs_of("plain")).backward()
    assert all(torch.equal(p, before[n]) for n, p in own(model).items())


# -- weights that are trained whole, as in a plain model -------------------------------------------


def torchao(kind: str) -> Callable[[Any], Any]:
    def build(parameters: Any) -> Any:
        return getattr(pytest.importorskip("torchao.optim"), kind)(parameters, lr=1e-2)

    return build


def matrices(parameters: Any) -> list[Any]:
    return [p for p in parameters if p.ndim == 2]


def adafactor(parameters: Any) -> Any:
    found = pytest.importorskip("transformers.optimization")
    return found.Adafactor(parameters, lr=1e-2, relative_step=False, scale_parameter=True)


WHOLE: dict[str, Callable[[Any], Any]] = {
    "torch Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "torch Adafactor, foreach": lambda p: torch.optim.Adafactor(p, lr=1e-2, foreach=True),
    "torch LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "torch Muon": lambda p: torch.optim.Muon(matrices(p), lr=1e-2),
    "transformers Adafactor": adafactor,
    "bitsandbytes 8-bit": bitsandbytes,
    "CAME": came,
} | {f"torchao {kind}": torchao(kind) for kind in ("AdamW8bit", "AdamW4bit", "AdamWFp8")}
# The state of matrices of 4,096 numbers and more is low-bit.
WIDE = 64
ALL_ACTIVE = {
    "misa": lambda: passes.Misa(budget=1.0, period=100),
    "lisa": lambda: passes.Lisa(layers=3, period=100),
    "exact": lambda: [passes.Recompute(), passes.ChunkedLoss()],
}


def plainly(kind: str) -> Any:
    """Let torchao's steps run as they are written: compiling them takes 30 s."""
    stance = torch.compiler.set_stance
    return stance("force_eager") if kind.startswith("torchao") else nullcontext()


@pytest.mark.parametrize(
    ("kind", "row"),
    # Muon takes matrices only, and LISA trains vectors too.
    [(kind, row) for kind in WHOLE for row in ALL_ACTIVE if (kind, row) != ("torch Muon", "lisa")],
)
def test_a_weight_that_is_trained_whole_takes_the_plain_models_way(kind, row):
    """Factors, orthogonal steps and quantised blocks are of the weight as it is."""
    torch.manual_seed(0)
    plain = Tiny(width=WIDE).train()
    ours = surgery.apply(copy.deepcopy(plain), ALL_ACTIVE[row]())
    trained = {c.weight for c in surgery.coordinates(ours)}
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in trained)
    start = weights(plain)
    for model in (plain, ours):
        optimizer = WHOLE[kind]([p for p in model.parameters() if p.requires_grad])
        for seed in range(3):

            def closure(model=model, optimizer=optimizer, seed=seed):
                optimizer.zero_grad()
                loss = loss_of(model, inputs_of("plain", seed=seed))
                loss.backward()
                return loss

            inside = isinstance(optimizer, torch.optim.LBFGS)
            if not inside:
                closure()
            with plainly(kind):
                optimizer.step(closure if inside else None)
    assert state_of(ours).clock.step == 3
    for name, parameter in own(plain).items():
        moved = (parameter - start[name]).norm()
        # Gradients of samplers are eager's to the bit; exact rewrites sum in another order.
        bound = 1e-3 * moved if row == "exact" else 0.0
        assert (own(ours)[name] - parameter).norm() <= bound, name
        assert (moved > 0) == (name in trained and (kind != "torch Muon" or parameter.ndim == 2))


@pytest.mark.parametrize("kind", ["torchao AdamW8bit", "torch Adafactor", "transformers Adafactor"])
def test_every_entry_of_a_block_moves(kind):
    """A block has factors and quantised pieces of its own: not the plain model's to the bit."""
    ours = surgery.apply(make("gpt2", n_embd=WIDE), passes.Misa(budget=1.0, period=100))
    before = weights(ours)
    optimizer = WHOLE[kind](ours.parameters())
    loss_of(ours, inputs_of("gpt2")).backward()
    with plainly(kind):
        optimizer.step()
    assert {c.weight for c in surgery.coordinates(ours) if c.parameter is not own(ours)[c.weight]}
    for c in surgery.coordinates(ours):
        moved = own(ours)[c.weight].detach() != before[c.weight]
        assert float(moved.float().mean()) > 0.99, c.weight


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "NAdam", "RAdam", "Adamax", "RMSprop"])
def test_capturable_needs_an_accelerator_as_without_surgery(kind):
    model = surgery.apply(make("plain"), ALL_ACTIVE["misa"]())
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-3, capturable=True)
    before = weights(model)
    loss_of(model, inputs_of("plain")).backward()
    with pytest.raises(AssertionError, match="capturable=True"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in own(model).items())
    steps(model, torch.optim.AdamW(model.parameters(), lr=1e-3), range(1))
    assert state_of(model).clock.step == 1  # the step that failed is not around this one


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["AdamW", "Adam", "NAdam", "RAdam", "Adamax", "RMSprop"])
def test_capturable_takes_the_plain_models_way(kind):
    start = make("plain").cuda()
    ours = surgery.apply(copy.deepcopy(start), ALL_ACTIVE["misa"]())
    plain = copy.deepcopy(start)
    trained = {c.weight for c in surgery.coordinates(ours)}
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in trained)
    for model in (plain, ours):
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-3, capturable=True)
        for seed in range(3):
            batch = inputs_of("plain", seed=seed)
            loss_of(model, {k: t.cuda() for k, t in batch.items()}).backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in own(plain).items():
        torch.testing.assert_close(own(ours)[name], parameter, rtol=1e-5, atol=1e-6, msg=name)


def test_sparse_adam_refuses_dense_gradients_as_without_surgery():
    model = surgery.apply(make("plain"), ALL_ACTIVE["misa"]())
    optimizer = torch.optim.SparseAdam([*model.parameters()])
    before = weights(model)
    loss_of(model, inputs_of("plain")).backward()
    with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in own(model).items())


RENEWED: dict[str, Callable[[Any], Any]] = OPTIMIZERS | {
    "torch AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, amsgrad=True),
    "torch SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "torch RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, centered=True),
    "torch Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2),
    "torchao 8-bit": lambda parameters: pytest.importorskip("torchao.optim").AdamW8bit(
        parameters, lr=1e-2, block_size=16
    ),
}


@pytest.mark.parametrize("state", ["keep", "project"])
@pytest.mark.parametrize("kind", RENEWED)
def test_a_subspace_that_is_renewed_as_it_was_changes_nothing(kind, state, monkeypatch):
    """What an optimizer keeps goes along, the iterate of schedule-free ones among it."""
    monkeypatch.setattr(Frame, "_drawn", lambda self, grad, x: torch.eye(self.channels, 4))
    found = []
    for period in (2, 1000):
        model = make("plain").double()
        surgery.apply(model, passes.Galore(rank=4, period=period, on_resample=state))
        optimizer = RENEWED[kind](model.parameters())
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0  # of R, which begins again
        if (kind, state) == ("bitsandbytes 8-bit", "project"):
            with pytest.raises(surgery.OptimizerError, match=r"optimizer's 'state1' over into"):
                steps(model, optimizer, range(8))
            return
        steps(model, optimizer, range(8))
        found.append(weights(model))
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-5, atol=1e-6, msg=name)
