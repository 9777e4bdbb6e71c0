"""What a law is run on: a pass, a model, batches; and what laws look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.api import apply, coordinates
from surgery.catalogue import resolve
from surgery.contract.method import overrides
from surgery.engine.decide import Decision, decide
from surgery.memory import loss_of
from surgery.testing.models import tiny, tokens
from surgery.weights.table import TABLE

Inputs = dict[str, Tensor]


class LawError(AssertionError):
    """A pass breaks a law of the library; the text says which law, and how."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pass on a model, with what the laws may expect of it.

    spec: an instance of the pass, its registered name, or a list of these. model: a function that
    returns the same model in each call, in training mode. inputs: a function that returns a batch
    of keyword arguments from a seed and a number of rows. forward: the relative tolerance of the
    first forward against the plain one (0: bit for bit). gradient: the relative tolerance of the
    coordinates' gradients against those that follow from the plain model's dense gradient. average:
    whether gradients are right only on average, or depend on how a batch is divided. rate: a
    learning rate of plain SGD that is small for this pass. notes: what the run that several laws
    share has found; keep the case to keep it.
    """

    spec: Any
    model: Callable[[], nn.Module] = tiny
    inputs: Callable[..., Inputs] = tokens
    forward: float = 0.0
    gradient: float = 1e-6
    average: bool = False
    rate: float = 0.1
    notes: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"notes": {}}  # other processes make their own

    def passes(self, **changes: Any) -> list[Any]:
        """Return the passes, with options changed that they have."""
        return [_changed(each, changes) for each in resolve(self.spec, {})]

    def applied(self, **changes: Any) -> nn.Module:
        """Return a fresh model with the passes applied."""
        return apply(self.model(), self.passes(**changes))

    def decision(self, **changes: Any) -> Decision:
        """Return what would be done to a fresh model."""
        return decide(self.model(), self.passes(**changes))

    @property
    def trains_by_forwards(self) -> bool:
        return any(overrides(method, "drive") for method in self.decision().methods)

    def loss(self, model: nn.Module, seed: int = 1, rows: int = 2) -> Tensor:
        """Run the model on a batch, as its user would."""
        return loss_of(model(**self.inputs(seed=seed, rows=rows)))

    def train(
        self, model: nn.Module, steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.Optimizer:
        """Train in a plain loop."""
        optimizer = optimizer or adamw(model)
        for seed in range(steps):
            self.loss(model, seed).backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer


def _changed(options: Any, changes: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(options)}
    wanted = {key: value for key, value in changes.items() if key in known}
    # A pass that never draws anew keeps doing so.
    fixed = {key for key in wanted if getattr(options, key) is None}
    return dataclasses.replace(options, **{k: v for k, v in wanted.items() if k not in fixed})


def adamw(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    """Return the optimizer of most users."""
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)


def own(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the model's own parameters, without the table's."""
    return {n: p for n, p in model.named_parameters() if TABLE not in n.split(".")}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the model's own weights."""
    return {name: p.detach().clone() for name, p in own(model).items()}


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Return everything about a module that apply and remove must keep."""
    return {
        "class": type(model),
        "modules": {n: (id(m), type(m), sorted(m.__dict__)) for n, m in model.named_modules()},
        "parameters": {
            n: (id(p), p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()
        },
        "buffers": {n: id(b) for n, b in model.named_buffers()},
        "keys": list(model.state_dict()),
        "hooks": {
            n: [len(v) for k, v in sorted(m.__dict__.items()) if k.endswith("_hooks")]
            for n, m in model.named_modules()
        },
    }


class Moved:
    """Where a run should have taken each weight: its coordinates' steps, in plain arithmetic."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.weights = model, weights(model)
        self.before: dict[int, Tensor] = {}
        optimizer.register_step_pre_hook(self.note)

    def note(self, *_: object) -> None:
        """Before a step: note where the coordinates are."""
        self.before = {id(p): p.detach().clone() for p in self.model.parameters()}

    def move(self, *_: object) -> None:
        """After it: take the weights along."""
        for c in coordinates(self.model):
            step = c.parameter.detach() - self.before[id(c.parameter)]
            if not bool(step.any()):
                continue
            # The map of a step may depend on the weight as it was before that step.
            weight = self.model.get_parameter(c.weight)
            now, weight.data = weight.data, self.before.get(id(weight), weight.data)
            self.weights[c.weight] += c.expand(step)
            weight.data = now
        self.note()


def equal(found: Tensor, expected: Tensor, what: str) -> None:
    """Raise LawError unless two tensors are equal bit for bit."""
    if not torch.equal(found, expected):
        raise LawError(f"{what}: not the same to the bit, off by up to {_off(found, expected)}")


def close(found: Tensor, expected: Tensor, what: str, rtol: float, atol: float) -> None:
    """Raise LawError unless two tensors are close."""
    if not torch.allclose(found, expected, rtol=rtol, atol=atol):
        raise LawError(f"{what}: off by up to {_off(found, expected)}")


def demand(condition: Any, what: str) -> None:
    """Raise LawError(what) unless the condition holds."""
    if not condition:
        raise LawError(what)


def _off(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape:
        return f"shapes {tuple(found.shape)} and {tuple(expected.shape)}"
    return f"{float((found.double() - expected.double()).abs().max()):.2g}"
