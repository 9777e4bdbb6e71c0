"""A long life of one model: what its user may do to it, and a plain model that is led along.

`Life` is one model under a pass, and beside it a plain copy, trained by the pass's equation: dense
gradients by eager autograd, taken through the adjoint of what `surgery.coordinates` says, and a
torch optimizer of its own. `ACTIONS` are what may happen. tests/test_long_life.py lets hypothesis
choose, tests/soak.py (`make soak`) goes on for thousands of steps.
"""

from __future__ import annotations

import copy
import gc
import io
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from laws import state_of
from models import inputs_of, loss_of
from torch import Tensor, nn
from torch.nn import functional

import passes
import surgery
from surgery.testing import Tiny

PERIOD = 3


class GatedBlock(nn.Module):
    """A block with one wide matrix, which MISA trains in parts, and dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 6 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        one, two, three = self.up(self.norm(x)).chunk(3, -1)
        x = x + self.down(functional.gelu(one) * torch.sigmoid(two) + torch.tanh(three))
        return functional.dropout(x, 0.1, self.training)


class Gated(Tiny):
    """`Tiny` of such blocks: smooth, so that rounding is not made larger at kinks."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__(width, depth)
        self.blocks = nn.ModuleList(GatedBlock(width) for _ in range(depth))


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of life.

    mapped: what stands for weights are small parameters, which `redraws` takes back to zero every
    PERIOD steps; else copies. exact: no pass trains. slope: gradients come from two forwards.
    within: what weights may differ by.
    """

    spec: Callable[[], Any]
    dtype: torch.dtype = torch.float64  # two ways to the same number differ by 1e-16 there
    mapped: bool = False
    redraws: bool = False
    exact: bool = False
    slope: bool = False
    within: float = 1e-6  # of steps of 1e-3: AdamW enlarges last bits of what is nearly zero


KINDS = {
    "exact": Kind(spec=lambda: [passes.Recompute(), passes.ChunkedLoss()], exact=True),
    "misa": Kind(spec=lambda: passes.Misa(budget=0.16, period=PERIOD)),
    "misa, bfloat16": Kind(
        spec=lambda: passes.Misa(budget=0.16, period=PERIOD), dtype=torch.bfloat16
    ),
    "badam": Kind(spec=lambda: [passes.BAdam(period=PERIOD), passes.Recompute()]),
    "lisa, bfloat16": Kind(spec=lambda: passes.Lisa(layers=1, period=PERIOD), dtype=torch.bfloat16),
    "rso": Kind(spec=lambda: passes.Rso(rank=4, period=PERIOD), mapped=True, redraws=True),
    "velora": Kind(spec=lambda: passes.Velora(groups=4, init="random"), mapped=True),
    # Weights renew their P in steps of their own, which the reference does not follow.
    "galore": Kind(
        spec=lambda: passes.Galore(rank=4, period=10**6, projection="random"), mapped=True
    ),
    # Slopes from two forwards are right up to eps^2 times third derivatives.
    "mezo": Kind(spec=lambda: passes.Mezo(eps=1e-4), mapped=True, slope=True, within=1e-6),
}

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, foreach=True),
}
SLOPES = {  # nothing that divides by a slope, whose last digits are those of eps
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-3),
    "SGD, slower": lambda p: torch.optim.SGD(p, lr=1e-4),
}


def larger(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 1.25


def smaller(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] * 0.75,)


HOOKS: dict[str, tuple[str, str, Any]] = {
    "out": ("blocks.1.up", "register_forward_hook", larger),
    "in": ("blocks.2.down", "register_forward_pre_hook", smaller),
}

Key = tuple[str, int]  # of a coordinate: its weight, and which of that


class Life:
    """A model under a pass, and its reference. gone: what nobody holds any more.

    One step is `step`; other actions leave the reference as it is, or change it the same way.
    """

    def __init__(self, name: str) -> None:
        self.kind = KINDS[name]
        self.optimizers = SLOPES if self.kind.slope else OPTIMIZERS
        self.folder = tempfile.TemporaryDirectory()
        self.saved: dict[str, Any] | None = None
        self.gone: list[weakref.ref[Any]] = []
        self.known: set[Any] = set()  # structures that any of its models was called with
        self.frozen: set[int] = set()
        self.hooks: dict[str, list[Any]] = {}
        torch.manual_seed(0)
        self.plain = Gated().to(self.kind.dtype).train()
        self.model = copy.deepcopy(self.plain)
        self.narrow = self.kind.dtype is torch.bfloat16
        self.exact = {  # what weights would be without rounding
            name: p.detach().float() if self.narrow else p.detach()
            for name, p in self.plain.named_parameters()
        }
        self.apply()
        self.build(next(iter(self.optimizers)))

    # -- the reference -----------------------------------------------------------------------------

    def apply(self) -> None:
        surgery.apply(self.model, self.kind.spec())
        self.seen: set[Any] = set()  # structures that the model was called with
        self.steps = self.skipped = self.since = 0
        self.active: frozenset[Key] = frozenset()
        self.own: dict[Key, nn.Parameter] = {}
        shared: dict[int, nn.Parameter] = {}
        for key, c in self.coordinates().items():
            if c.parameter is self.model.get_parameter(key[0]):
                self.own[key] = self.plain.get_parameter(key[0])
            else:
                fresh = nn.Parameter(torch.zeros(c.parameter.shape, dtype=c.parameter.dtype))
                self.own[key] = shared.setdefault(id(c.parameter), fresh)
        self.drawn = self.drawn_now()

    def coordinates(self) -> dict[Key, Any]:
        counts: dict[str, int] = {}
        found = {}
        for c in surgery.coordinates(self.model):
            counts[c.weight] = counts.get(c.weight, -1) + 1
            found[c.weight, counts[c.weight]] = c
        return found

    def whole(self, key: Key) -> bool:
        """Whether the weight itself is trained."""
        return self.own[key] is self.plain.get_parameter(key[0])

    def copied(self, key: Key) -> bool:
        return not self.kind.mapped and not self.whole(key)

    def drawn_now(self) -> frozenset[Key]:
        """What the round trains, frozen by the user or not."""
        if self.kind.exact:
            return frozenset(self.own)
        own = state_of(self.model).decision.coordinates
        return frozenset(k for k, c in zip(self.coordinates(), own, strict=True) if c.drawn)

    def build(self, name: str) -> None:
        """Build an optimizer for each of the two."""
        if hasattr(self, "optimizer"):
            self.gone.append(weakref.ref(self.optimizer))
        self.optimizer_name = name
        self.optimizer = self.optimizers[name]([*self.model.parameters()])
        self.beside = self.optimizers[name]([*dict.fromkeys(self.own.values())])

    @torch.no_grad()
    def as_weights(self, copies: Iterable[Key]) -> None:
        """Let copies be as their weights are."""
        found = self.coordinates()
        for key in copies:
            if self.copied(key):
                self.own[key].copy_(adjoint(found[key], self.exact[key[0]]))

    def train_plain(self, dense: Mapping[str, Tensor], clip: float | None) -> None:
        """Make the step that the model is about to make."""
        found = self.coordinates()
        active = frozenset(key for key, c in found.items() if c.active)
        self.as_weights(active - self.active)
        self.active = active
        self.beside.zero_grad()
        for key in active:
            gradient = adjoint(found[key], dense[key[0]].to(self.own[key].dtype))
            held = self.own[key].grad
            self.own[key].grad = gradient if held is None else held + gradient
        once = [*dict.fromkeys(self.own.values())]
        if clip is not None:
            nn.utils.clip_grad_norm_(once, clip)
        before = {key: self.own[key].detach().clone() for key in active}
        self.beside.step()
        with torch.no_grad():
            for key in active:
                c, exact, now = found[key], self.exact[key[0]], self.own[key].detach()
                if self.copied(key):
                    mask = c.expand(torch.ones_like(now)).bool()
                    exact.copy_(torch.where(mask, c.expand(now), exact))
                elif not self.whole(key):
                    exact += c.expand(now - before[key])

    def end_step(self) -> None:
        """Begin the round that the model has begun."""
        self.steps += 1
        self.since += 1
        if self.kind.slope or (self.kind.redraws and self.since == PERIOD):
            redrawn = [own for key, own in self.own.items() if not self.whole(key)]
            for own in redrawn:
                own.detach().zero_()
                self.beside.state.pop(own, None)
        self.since %= PERIOD
        drawn = self.drawn_now()
        for key in self.drawn ^ drawn:
            self.beside.state.pop(self.own[key], None)
        self.drawn = drawn

    # -- comparing ---------------------------------------------------------------------------------

    @torch.no_grad()
    def check(self) -> None:
        """Hold the two against each other."""
        found, clock = self.coordinates(), state_of(self.model).clock
        for name, weight in self.plain.named_parameters():
            ours = self.model.get_parameter(name).detach()
            # Into 16 bits steps are rounded at random: to one of the two neighbours.
            near = 2**-7 if self.narrow else 0.0
            torch.testing.assert_close(
                ours.to(self.exact[name]),
                self.exact[name].detach(),
                rtol=near,
                atol=self.kind.within,
                msg=lambda text, name=name: f"{name}: {text}",
            )
            weight.copy_(ours)  # so that what differs does not grow
            self.exact[name].copy_(ours)
        for key in self.active:
            if key in found and found[key].active:
                ours, own = found[key].parameter.detach(), self.own[key].detach()
                torch.testing.assert_close(ours, own, rtol=1e-5, atol=self.kind.within)
                own.copy_(ours)
        assert (clock.step, clock.skipped) == (self.steps, self.skipped)
        assert len(self.seen) >= state_of(self.model).dispatch.captures
        parameters = {id(own): key for key, own in reversed(self.own.items())}
        beside = {parameters[id(p)] for p, state in self.beside.state.items() if state}
        names = {id(c.parameter): key for key, c in reversed(found.items())}
        names |= {id(self.model.get_parameter(key[0])): key for key in self.own if self.whole(key)}
        held = {names[id(p)] for p, state in self.optimizer.state.items() if state}
        assert held == beside, held ^ beside

    def end(self) -> None:
        """End it; see that what was replaced is freed."""
        self.folder.cleanup()
        self.check_gone()

    def check_gone(self) -> None:
        """See that what was replaced is freed."""
        gc.collect()
        assert not [each for ref in self.gone if (each := ref()) is not None]
        self.gone.clear()

    # -- calling -----------------------------------------------------------------------------------

    def loss(self, model: nn.Module, seed: int, rows: int = 2) -> Tensor:
        torch.manual_seed(seed)  # the same dropout
        if model is self.model and torch.is_grad_enabled():
            # Dynamo takes one row for another structure.
            frozen = frozenset(self.frozen) if self.kind.exact else None  # of others, gates tell
            state = model.training, frozenset(self.hooks), frozen
            self.seen.add((rows == 1, *state))
            self.known.add((rows == 1, *state))
            self.rest()
        return loss_of(model, inputs_of("plain", seed=seed, rows=rows))

    def rest(self) -> None:
        """See what a forward sees: copies of what is frozen rest, and begin anew as weights."""
        if self.kind.mapped:
            return
        asleep = self.asleep()
        self.active = frozenset(key for key in self.active if not key[0].startswith(asleep))

    def asleep(self) -> tuple[str, ...]:
        """Return how names of frozen weights begin."""
        return tuple(f"blocks.{block}." for block in self.frozen)

    def compare_losses(self, ours: Tensor, plain: Tensor) -> None:
        near = 1e-4 if self.kind.slope else 2**-7 if self.narrow else 1e-12
        torch.testing.assert_close(ours.detach(), plain.detach(), rtol=near, atol=0.0)

    # -- what may happen ---------------------------------------------------------------------------

    def step(self, seed: int, rows: int, micro: int, clip: float | None, closure: bool) -> None:
        """Make an optimizer step, on `micro` batches."""
        if all(name.startswith(self.asleep()) for name, _ in self.own):
            assert not self.loss(self.model, seed, rows).requires_grad  # a frozen model
            return
        weights = dict(self.plain.named_parameters())
        dense = {name: torch.zeros_like(self.exact[name]) for name in weights}

        def gradients() -> Tensor:
            for i in range(micro):
                loss = self.loss(self.model, seed + i, rows + i)
                loss.backward()
                beside = self.loss(self.plain, seed + i, rows + i)
                self.compare_losses(loss, beside)
                found = torch.autograd.grad(beside, [*weights.values()])
                for name, gradient in zip(weights, found, strict=True):
                    dense[name] += gradient
            self.train_plain(dense, clip)
            if clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            return loss

        if closure:
            self.optimizer.step(gradients)
        else:
            gradients()
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.end_step()

    def nan(self, seed: int) -> None:
        """Make a step whose gradients are not finite; exact passes leave that to its user."""
        active = {c.weight for c in surgery.coordinates(self.model) if c.active}
        if self.kind.exact or all(name.startswith(self.asleep()) for name in active):
            return  # a step that trains nothing has no gradient that is not finite
        (self.loss(self.model, seed) * float("nan")).backward()
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.optimizer.step()
        self.skipped += 1
        for name, parameter in self.model.named_parameters():
            assert torch.equal(parameter, before[name]), name

    def evaluate(self, seed: int, eval: bool, gradients: bool) -> None:
        """Run it forward only."""
        for model in (self.model, self.plain):
            model.train(not eval)
        with torch.set_grad_enabled(gradients):
            losses = [self.loss(model, seed, 3) for model in (self.model, self.plain)]
        self.compare_losses(*losses)
        for model in (self.model, self.plain):
            model.train()

    def hook(self, which: str) -> None:
        """Put a hook on, or take it off."""
        if which in self.hooks:
            for handle in self.hooks.pop(which):
                handle.remove()
            return
        where, how, does = HOOKS[which]
        models = self.model, self.plain
        self.hooks[which] = [getattr(m.get_submodule(where), how)(does) for m in models]

    def freeze(self, block: int) -> None:
        """Freeze a block, or train it again."""
        self.frozen ^= {block}
        for name in {name for name, _ in self.own if name.startswith(f"blocks.{block}.")}:
            self.model.get_parameter(name).requires_grad_(block not in self.frozen)

    def report(self, seed: int, batch: bool) -> None:
        """Ask for a report; it changes nothing."""
        if batch:
            self.rest()
            self.seen.add(("by keywords", frozenset(self.hooks), frozenset(self.frozen)))
        inputs = inputs_of("plain", seed=seed) if batch else None
        text = str(surgery.report(self.model, inputs and {**inputs, "targets": inputs["tokens"]}))
        assert f"{self.steps:,}" in text

    def scale(self, by: float) -> None:
        """Write all weights, as a load does."""
        self.model.load_state_dict({k: v * by for k, v in self.model.state_dict().items()})
        # Copies follow at the next read; on a copied model at the first of training, and there what
        # was written tells itself by its value alone.
        bound = state_of(self.model).binding.bound
        with torch.set_grad_enabled(not bound):
            self.loss(self.model, 0)
        self.go_back({k: v * by for k, v in self.plain.state_dict().items()})
        if bound or by != 1.0:
            self.as_weights(self.active)

    @torch.no_grad()
    def go_back(self, weights: Mapping[str, Tensor]) -> None:
        """Let the reference have these weights."""
        self.plain.load_state_dict(weights)
        for name, parameter in self.plain.named_parameters():
            self.exact[name].copy_(parameter)

    def save(self) -> None:
        surgery.save(self.model, self.folder.name, self.optimizer)
        self.saved = copy.deepcopy(
            {
                "weights": self.plain.state_dict(),
                "own": {key: p.detach() for key, p in self.own.items()},
                "optimizer": self.beside.state_dict(),
                "name": self.optimizer_name,
                "counts": (self.steps, self.skipped, self.since),
                "rounds": (self.active, self.drawn),
            }
        )

    def load(self, fresh: bool) -> None:
        """Go back to the last save, on the same objects or on fresh ones."""
        if self.saved is None:
            return
        saved = copy.deepcopy(self.saved)
        if fresh:
            torch.manual_seed(5)
            self.replace(surgery.apply(Gated().to(self.kind.dtype).train(), self.kind.spec()))
        if fresh or self.optimizer_name != saved["name"]:
            self.build(saved["name"])
        surgery.load(self.model, self.folder.name, self.optimizer)
        self.go_back(saved["weights"])
        for key, value in saved["own"].items():
            self.own[key].detach().copy_(value)
        self.beside.load_state_dict(saved["optimizer"])
        self.steps, self.skipped, self.since = saved["counts"]
        self.active, self.drawn = saved["rounds"]

    def copy(self, pickled: bool) -> None:
        """Go on with a copy."""
        if pickled:
            held = io.BytesIO()
            torch.save(self.model, held)
            held.seek(0)
            model = torch.load(held, weights_only=False)
        else:
            model = copy.deepcopy(self.model)
        state = self.optimizer.state_dict()
        self.replace(model)
        beside = self.beside
        self.build(self.optimizer_name)
        self.beside = beside
        self.optimizer.load_state_dict(state)

    def replace(self, model: nn.Module) -> None:
        """Go on with another model, under the same hooks, with the same weights frozen."""
        for which, (handle, _) in self.hooks.items():
            handle.remove()  # a copy has them
            where, how, does = HOOKS[which]
            own = model.get_submodule(where)
            own._forward_hooks.clear()
            own._forward_pre_hooks.clear()
            self.hooks[which][0] = getattr(own, how)(does)
        for name, _ in self.own:
            held = model.get_parameter(name)
            held.requires_grad_(self.model.get_parameter(name).requires_grad)
        self.gone.append(weakref.ref(self.model))
        self.model, self.seen = model, set()

    def apply_again(self) -> None:
        """Take surgery out, and put it in again."""
        keys = [*self.plain.state_dict()]
        assert surgery.remove(self.model) is self.model
        assert [*self.model.state_dict()] == keys
        assert "forward" not in vars(self.model)
        self.frozen.clear()
        self.apply()
        self.build(self.optimizer_name)

    def other_optimizer(self, index: int) -> None:
        names = [name for name in self.optimizers if name != self.optimizer_name]
        self.build(names[index % len(names)])


def adjoint(c: Any, dense: Tensor) -> Tensor:
    """Return the gradient of a coordinate, given that of its weight."""
    shape = c.parameter.shape
    if shape == dense.shape:
        return dense
    if len(shape) == 1 and shape[0] < 4:  # slopes along a few directions
        basis = torch.eye(shape[0], dtype=dense.dtype)
        return torch.stack([(dense * c.expand(e)).sum() for e in basis])
    with torch.enable_grad():
        e = torch.zeros(shape, dtype=dense.dtype, requires_grad=True)
        (found,) = torch.autograd.grad(c.expand(e), e, dense)
    return found


# -- chance --------------------------------------------------------------------------------------

Draw = Callable[[Any], Any]  # of the integers below a number: random.Random.randrange, hypothesis
ACTIONS: dict[str, Callable[[Life, Draw], None]] = {
    "step": lambda life, below: life.step(
        below(1000), 1 + below(4), 1 + below(2), (None, 0.1)[below(2)], below(4) == 3
    ),
    "nan": lambda life, below: life.nan(below(1000)),
    "evaluate": lambda life, below: life.evaluate(below(1000), below(2) == 1, below(2) == 1),
    "hook": lambda life, below: life.hook([*HOOKS][below(len(HOOKS))]),
    "freeze": lambda life, below: life.freeze(below(3)),
    "report": lambda life, below: life.report(below(1000), below(2) == 1),
    "scale": lambda life, below: life.scale((1.0, 0.99)[below(2)]),
    "save": lambda life, below: life.save(),
    "load": lambda life, below: life.load(below(2) == 1),
    "copy": lambda life, below: life.copy(below(2) == 1),
    "apply_again": lambda life, below: life.apply_again(),
    "other_optimizer": lambda life, below: life.other_optimizer(below(3)),
}
