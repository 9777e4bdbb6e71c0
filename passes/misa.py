"""MISA: module-wise importance sampling. arXiv 2511.00056 (NeurIPS 2025).

In round n train a set of modules (matrices) S_n with numel(S_n) <= budget * numel(all) for T
steps, everything else frozen. After the round, for each b in S_n, with g the gradient of module b:

    G_b <- beta G_b + (1 - beta) mean_t ||g_t||^2 / numel(b)         (the score, a moving average)
    p_b = exp(eta G_b) / sum_j exp(eta G_j)                          (the next round's distribution)

Differences from the published code, all on purpose (notes in docs/passes/misa.md): the average is
debiased on the side instead of in place, divided by the true length of the round, taken before
clipping and free of loss scaling; a drawn module that does not fit waits instead of being skipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from surgery.passkit import (
    BudgetSampler,
    Coordinate,
    OptimizerError,
    OptionError,
    Precision,
    Rounds,
    TargetError,
    Targets,
    blocks,
    check_types,
    coordinate_of,
    demand,
    is_matrix,
    register,
    renamed,
    select,
    split,
)


@register("misa")
@renamed(smoothing="ema_decay", explore="uniform_mix", flush="momentum_step")
@dataclass(frozen=True, kw_only=True)
class Misa:
    """Options of MISA.

    budget: the largest share of all parameters that is trained at a time, in (0, 1].
    period: the number of optimizer steps in a round (T). eta: how strongly large scores are
    preferred; 0 draws uniformly. ema_decay: beta of the score. score: "relative" divides G by its
    mean over the modules, so that eta means the same for every model; "paper" takes G as it is.
    uniform_mix: the share of the uniform distribution that is mixed into p. span: draw each round
    from this many neighbouring blocks, so that backward ends below them. momentum_step: whether to
    add the paper's momentum step at the end of each round. precision: how 16-bit weights are
    trained. "auto" trains float32 copies, which take 4 bytes more for each parameter; "weights"
    trains the weights themselves, and steps of less than half their last digit are lost.
    always: parameters that are trained in every round, outside of the budget. targets: the matrices
    to draw from (default: every matrix of the repeated blocks). Both follow PEFT's matching rules.
    """

    saves = ("gradients", "optimizer", "activations")

    budget: float = 0.03
    period: int = 50
    eta: float = 1.0
    ema_decay: float = 0.8
    score: Literal["relative", "paper"] = "relative"
    uniform_mix: float = 0.0
    span: int | None = None
    momentum_step: bool = False
    precision: Precision = "auto"
    always: str | Sequence[str] = ()
    targets: Targets = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        share = f"budget={self.budget} is a share of all parameters and lies in (0, 1]; write 0.03"
        demand(0.0 < self.budget <= 1.0, self, f"{share} for 3 %.")
        demand(self.period >= 1, self, f"period={self.period} must be at least 1 step.")
        demand(math.isfinite(self.eta) and self.eta >= 0, self, f"eta={self.eta} must be >= 0.")
        demand(0 <= self.ema_decay < 1, self, f"ema_decay={self.ema_decay} must lie in [0, 1).")
        mix = self.uniform_mix
        demand(0 <= mix <= 1, self, f"uniform_mix={mix} must lie in [0, 1].")
        demand(self.span is None or self.span >= 1, self, f"span={self.span} must be at least 1.")

    def start(self, model: nn.Module) -> Rounds:
        """Plan the rounds on a model; changes nothing. Raises OptionError, TargetError."""
        total = sum(p.numel() for p in model.parameters())
        limit = int(self.budget * total)
        always = select(model, self.always, "always") if self.always else []
        places = {n: i for i, own in enumerate(blocks(model).values()) for n in own}
        names = select(model, self.targets, "targets") if self.targets is not None else places
        chosen = [
            name
            for name in names
            if is_matrix(model, name)
            and name not in always
            and model.get_parameter(name).requires_grad
        ]
        if not chosen:
            raise TargetError(
                "misa: no trainable matrix among the targets. The repeated blocks of this model "
                "hold no weight matrix with requires_grad=True; name some with targets=[...]."
            )
        smallest = min(chosen, key=lambda name: model.get_parameter(name).numel())
        if model.get_parameter(smallest).numel() > limit:
            raise OptionError(
                f"misa: budget={self.budget} allows {limit:,} of {total:,} parameters, fewer than "
                f"the smallest module has: {smallest} with "
                f"{model.get_parameter(smallest).numel():,}. Use budget="
                f"{model.get_parameter(smallest).numel() / total * 1.0001:.2g} or more."
            )
        found = [p for name in chosen for p in self._coordinates(model, name, limit)]
        last = max(places.values(), default=-1) + 1
        scores = MisaScores(options=self, names=tuple(each.name for each in found))
        sampler = BudgetSampler(
            sizes={each.name: each.numel for each in found},
            limit=limit,
            seed=self.seed,
            places={each.name: places.get(each.weight, last) for each in found},
            span=self.span,
        )
        return Rounds(
            name="misa",
            units={each.name: (each,) for each in found},
            period=self.period,
            draw=Draw(sampler=sampler, scores=scores),
            always=tuple(coordinate_of(model, n, precision=self.precision) for n in always),
            scores=scores,
            learned={"scores": scores, "sampler": sampler},
            ending=MomentumFlush() if self.momentum_step else None,
            total=total,
        )

    def _coordinates(self, model: nn.Module, name: str, limit: int) -> list[Coordinate]:
        # Half: of matrices between half the budget and all of it, no two would fit into a round,
        # and a round would stay a quarter empty.
        indices = split(model, name, max(1, limit // 2))
        found = [coordinate_of(model, name, index, self.precision) for index in indices]
        if any(each.numel > limit for each in found):
            raise OptionError(
                f"misa: one row of {name} is larger than the budget of {limit:,} parameters. "
                "Raise budget=, or leave this weight out with targets=."
            )
        return found


@dataclass(eq=False, kw_only=True)
class MisaScores:
    """G of every module: a raw moving average and the number of rounds it has seen."""

    options: Misa
    names: tuple[str, ...]
    raw: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)  # of this round
    steps: int = 0

    def observe(self, squared: dict[str, float]) -> None:
        for name, value in squared.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1

    def close(self) -> None:
        beta = self.options.ema_decay
        for name, value in self.sums.items():
            self.raw[name] = beta * self.raw.get(name, 0.0) + (1 - beta) * value / self.steps
            self.rounds[name] = self.rounds.get(name, 0) + 1
        self.sums, self.steps = {}, 0

    def state(self) -> dict[str, Any]:
        """Return all that was measured, of the round under way too."""
        return {n: getattr(self, n) for n in ("raw", "rounds", "sums", "steps")}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""
        self.raw, self.rounds = dict(state["raw"]), dict(state["rounds"])
        self.sums, self.steps = dict(state["sums"]), state["steps"]

    def value(self, name: str) -> float | None:
        """Return the debiased G of a module, None before its first round."""
        visits = self.rounds.get(name)
        return visits and self.raw[name] / (1 - self.options.ema_decay**visits)

    def log_p(self) -> dict[str, float]:
        """Return log p of every module. One not yet seen counts as average, or as 0 in "paper"."""
        seen = {name: g for name in self.names if (g := self.value(name)) is not None}
        mean = sum(seen.values()) / len(seen) if seen else 0.0
        if self.options.score == "paper":
            unit, unseen = 1.0, 0.0
        else:
            unit, unseen = mean or 1.0, mean
        exponents = {n: self.options.eta * seen.get(n, unseen) / unit for n in self.names}
        top = max(exponents.values())
        log_sum = top + math.log(sum(math.exp(e - top) for e in exponents.values()))
        mixed = self.options.uniform_mix / len(self.names)
        if not mixed:
            return {name: e - log_sum for name, e in exponents.items()}
        keep = 1 - self.options.uniform_mix
        return {n: math.log(keep * math.exp(e - log_sum) + mixed) for n, e in exponents.items()}


@dataclass(eq=False, kw_only=True)
class Draw:
    """The next round's modules, from the scores."""

    sampler: BudgetSampler
    scores: MisaScores

    def __call__(self, round: int) -> list[str]:
        return self.sampler.draw(round, self.scores.log_p())


class MomentumFlush:
    """MISA's extra momentum step at the end of a round (Algorithm 1, line 16): an `Ending`.

    W <- W - lr * beta1 / (1 - beta1) * m / (sqrt(v) + eps), with bias-corrected m and v: all that
    the momentum would still have added if every later gradient were zero. No decay.
    """

    def check(self, optimizer: Optimizer) -> None:
        if not all("betas" in group for group in optimizer.param_groups):
            raise OptimizerError(
                "misa: momentum_step=True adds Adam's momentum tail at the end of a round, and "
                f"{type(optimizer).__name__} has no betas. Use torch.optim.Adam or AdamW, or "
                "momentum_step=False."
            )

    def conflict(self, weight: str) -> str:
        return (
            f"momentum_step=True updates {weight} itself, but another pass trains it through "
            "coordinates of its own. Use momentum_step=False, or leave this weight out of the "
            "targets of one of the two passes."
        )

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, leaving: Sequence[Coordinate]) -> None:
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for each in leaving:
            state = optimizer.state.get(each.parameter)
            if not state:
                continue
            group = groups[id(each.parameter)]
            beta1, beta2 = group["betas"]
            step = float(state["step"])
            mean = state["exp_avg"] / (1 - beta1**step)
            root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
            sign = 1.0 if group.get("maximize") else -1.0
            tail = sign * float(group["lr"]) * beta1 / (1 - beta1)
            each.parameter.addcdiv_(mean, root, value=tail)
