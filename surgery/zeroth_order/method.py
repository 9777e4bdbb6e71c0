"""Gradients from forwards alone: the model is run at W + eps z and at W - eps z, without autograd.

The mid-point of what it returns is attached to the scalar coordinates by one autograd node: given
dL/dy, coordinate k gets scale * <dL/dy, (y+ - y-) / (2 eps)>, scale = 1 / sqrt(K) of K directions.
The loss may be computed in the model or outside of it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from surgery.activations.fusing import fuse
from surgery.compat.tensors import leaves
from surgery.contract.method import EVERY, Method, Run
from surgery.errors import ModelError, OptimizerError, listed
from surgery.kernels import directions
from surgery.ranks import rank_of_world
from surgery.weights import shards
from surgery.weights.coordinate import Coordinate, unique
from surgery.weights.matrices import wide
from surgery.zeroth_order.attach import Attach
from surgery.zeroth_order.direction import perturbation_of
from surgery.zeroth_order.evaluation import Modes, Output, Same
from surgery.zeroth_order.rewrite import perturb_reads

Estimate: TypeAlias = Literal["central", "one_sided", "forward"]


SILENT = 20  # steps running with a gradient of exactly zero before a warning


@dataclass(eq=False, kw_only=True)
class TwoPoint(Method):
    """The run-time state of a zeroth-order pass; also the `Probe` of its perturbations.

    weights: one coordinate for each weight; they share their (K,) scalars unless dense.
    """

    fuses = staticmethod(fuse)
    conflicts: ClassVar = {
        EVERY: "it trains by forwards alone: nothing is kept for backward, and no gradient reaches "
        "a weight, so {other} has nothing to work on"
    }

    name: str
    seed: int
    kind: directions.Kind
    eps: float
    directions: int
    estimate: Estimate
    dense: bool
    per_rank: bool
    ranks: int  # that probe directions of their own; 1 unless per_rank
    decays: bool = False  # whether the pass has a weight decay of its own
    weights: list[Coordinate] = field(default_factory=list)
    step: int = 0
    slot: int = 0
    shift: float | Tensor | None = None
    probed: bool = False  # a forward was evaluated since the last optimizer step
    silent: int = 0
    journal: list[tuple[float, ...]] = field(default_factory=list)  # K scalars, learning rate
    written: dict[Modes, frozenset[str]] = field(default_factory=dict)  # buffers, see `Same`

    @property
    def coordinates(self) -> Sequence[Coordinate]:
        return self.weights

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """What the optimizer steps."""
        return [each.parameter for each in unique(self.weights)]

    @property
    def slots(self) -> int:
        return self.directions * self.ranks

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.directions * self.ranks)

    def reread(self, graph: GraphModule) -> None:
        perturb_reads(graph)

    # -- one evaluation ----------------------------------------------------------------------------

    def before_forward(self, arguments: Mapping[str, Any], run: Run) -> None:
        given = [
            name
            for name, value in arguments.items()
            if any(isinstance(t, Tensor) and t.requires_grad for t in leaves(value))
        ]
        if given:
            raise ModelError(
                f"{self.name}: {listed(given)} requires a gradient, and none comes to what the "
                "model is given: slopes of coordinates come from two forwards. Give it detached; "
                f"or leave {self.name} out, to train what is in front of the model."
            )

    def drive(self, forward: Callable[[], Any], run: Run) -> Any:
        """Return the model's output, attached to the coordinates."""
        rank, world = rank_of_world()
        if self.per_rank and world != self.ranks:
            raise ModelError(
                f"{self.name}: per_rank=True was applied for {self.ranks} ranks, and there are "
                f"{world} now. Call torch.distributed.init_process_group before surgery.apply."
            )
        rank = rank if self.per_rank else 0
        slots = range(rank * self.directions, (rank + 1) * self.directions)
        same = Same(forward, run.model, self.written)
        with torch.no_grad():
            last, middle, slopes = self._evaluate(same, slots)
            if not run.rehearsal:
                same.keep()
        self.probed = self.probed or not run.rehearsal
        weights = [p.read for p in self.weights] if self.dense else [self.weights[0].read]
        flat = [value for each in slopes for value in each]
        attached = Attach.apply(self, slots, tuple(middle), len(flat), *flat, *weights)
        return last.with_values(attached)

    def _evaluate(
        self, run: Same, slots: Sequence[int]
    ) -> tuple[Output, Sequence[Tensor], Sequence[Sequence[Tensor]]]:
        """Return the last output, the mid-point of all values, and their slopes for each slot."""
        base = self._at(run, None) if self.estimate == "one_sided" else None
        last, middles, slopes = base, [], []
        for self.slot in slots:
            last = base  # lets go of the output of the slot before
            if self.estimate == "forward":
                last = self._tangent(run)
                middles.append(last.values)
                slopes.append(last.slopes)
                continue
            there = self._at(run, self.eps).values  # nothing else of this output is kept
            last = base or self._at(run, -self.eps)
            pairs = list(zip(there, last.values, strict=True))
            distance = self.eps if base else 2 * self.eps
            slopes.append([(a.to(wide(a)) - b.to(wide(b))) / distance for a, b in pairs])
            middles.append([torch.lerp(a, b, 0.5) for a, b in pairs])
        assert last is not None
        if base is not None:
            return last, base.values, slopes
        if len(middles) == 1:
            return last, middles[0], slopes
        return last, [torch.stack(each).mean(0) for each in zip(*middles, strict=True)], slopes

    def _at(self, run: Same, shift: float | None) -> Output:
        self.shift = shift
        try:
            return Output(run())
        finally:
            self.shift = None

    def _tangent(self, run: Same) -> Output:
        """Evaluate the exact directional derivative, by forward-mode differentiation."""
        weight = self.weights[0].parameter
        # Fused attention has no forward-mode derivative.
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            zero = torch.zeros((), device=weight.device, dtype=wide(weight))
            self.shift = forward_ad.make_dual(zero, torch.ones_like(zero))
            try:
                output = Output(run())
            finally:
                self.shift = None
            pairs = [forward_ad.unpack_dual(value) for value in output.values]
            output.slopes = [
                torch.zeros_like(value) if tangent is None else tangent.clone()
                for value, tangent in pairs
            ]
            output.values = [value.clone() for value, _ in pairs]
        return output

    # -- the clock ---------------------------------------------------------------------------------

    def check(self, optimizer: Optimizer) -> None:
        if self.dense:
            return
        kind, groups = type(optimizer).__name__, optimizer.param_groups
        decays = [group["weight_decay"] for group in groups if group.get("weight_decay")]
        if decays:
            warnings.warn(
                f"{self.name}: the weight_decay of {kind} acts on scalars that start from zero in "
                f"each step: it does nothing. {self._instead(decays[0])}weight_decay=0 to the "
                "optimizer.",
                stacklevel=2,
            )
        if any(group.get("momentum") or (group.get("betas") or (0.0,))[0] for group in groups):
            warnings.warn(
                f"{self.name}: {kind} has momentum, and the scalars that it steps stand "
                "for other directions after each step. Their state is dropped, so momentum does "
                "nothing and Adam takes the sign of each slope. Use torch.optim.SGD, or dense=True "
                "for momentum over weights.",
                stacklevel=2,
            )

    def _instead(self, decay: float) -> str:
        if not self.decays:
            return f"{self.name} has none of its own: give "
        example = f'surgery.apply(model, "{self.name}", weight_decay={decay})'
        return f"Give it to the pass, {example}, and "

    def before_step(self) -> None:
        if self.probed and all(parameter.grad is None for parameter in self.parameters):
            raise OptimizerError(
                f"{self.name}: no gradient has reached the coordinates since the last forward: the "
                "loss does not depend on the model's output, or backward was not called. Compute "
                "the loss from what model(...) returns, without detach() or item()."
            )

    def after_step(self, run: Run) -> None:
        self._listen()
        self.probed = False
        if not self.dense:
            scalars = self.weights[0].parameter
            groups = [group for optimizer in run.driving for group in optimizer.param_groups]
            rates = [g["lr"] for g in groups if any(p is scalars for p in g["params"])]
            self.journal.append((*shards.whole(scalars.detach()).tolist(), float(rates[0])))
            scalars.detach().zero_()  # they stand for other directions from now on
            run.forget(self.weights[:1])
        self.advance()

    def advance(self) -> None:
        """Begin the next step: other directions."""
        self.step += 1
        for each in self.weights:
            if each.mapped:
                each.mapped.since = self.step
            perturbation_of(each).forget()

    def _listen(self) -> None:
        grads = [shards.whole(p.grad) for p in self.parameters if p.grad is not None]
        heard = any(bool(grad.any()) for grad in grads)
        self.silent = 0 if heard or not self.probed else self.silent + 1
        if self.silent == SILENT:
            warnings.warn(
                f"{self.name}: the two evaluations have given exactly the same in {SILENT} steps "
                f"running. eps={self.eps} may be too small for the dtype of the model or of the "
                "loss (keep the loss in float32), or the loss is constant.",
                stacklevel=2,
            )

    def state(self) -> dict[str, Any]:
        notes = {c.weight: kept for c in self.weights if (kept := perturbation_of(c).state())}
        steps = torch.tensor(self.journal, dtype=torch.float64)
        return {"step": self.step, "silent": self.silent, "journal": steps, "weights": notes}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.step, self.silent, self.probed = state["step"], state["silent"], False
        self.journal = [tuple(row) for row in state["journal"].tolist()]
        for each in self.weights:
            perturbation_of(each).restore(state["weights"].get(each.weight, {}))

    def lines(self) -> Iterable[tuple[str, str]]:
        numel = sum(each.size for each in self.weights)
        runs = {"central": 2 * self.directions, "one_sided": self.directions + 1}
        count = runs.get(self.estimate, self.directions)
        yield "perturbed", f"{len(self.weights)} weights, {numel:,} parameters, eps {self.eps:g}"
        yield "forwards", f"{count} for each batch ({self.estimate}), no backward"
        if self.dense:
            yield "dense", "gradients and optimizer state have the size of the weights"
