"""Options and start of passes that train by forwards, and the weights that they perturb."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from surgery.compat import hf
from surgery.contract.options import check_types, demand
from surgery.errors import ModelError, TargetError, listed
from surgery.kernels.directions import Kind
from surgery.ranks import rank_of_world
from surgery.weights.coordinate import Coordinate, Mapped, coordinate_of, densely
from surgery.weights.linears import check_steps
from surgery.weights.matrices import wide
from surgery.weights.targets import Targets, blocks, select
from surgery.zeroth_order.direction import Perturbation
from surgery.zeroth_order.method import Estimate, TwoPoint, Update

# What a model is perturbed by, by kind of weight: MeZO's own for full weights, LoRA, prefixes.
EPS = {"lora_": 1e-2, "prompt_encoder": 1e-1, "prefix": 1e-1}


@dataclass(frozen=True, kw_only=True)
class ZerothOrder:
    """Options of all passes that train by forwards.

    eps: size of the perturbation (default: 1e-3; 1e-2 if all targets are LoRA's, 1e-1 if they are
    prefixes). directions: q, the number of directions in a step; each takes two forwards, and the
    variance of the gradient falls by q. noise: the distribution of z. estimate: "central",
    "one_sided" ((L(W + eps z) - L(W)) / eps, which takes q + 1 forwards), or "forward", the exact
    derivative along z by forward-mode differentiation, without eps. dense: whether the optimizer
    sees g z, as large as the weights, instead of g: for momentum and Adam over weights. blocks: the
    number of neighbouring blocks that a direction perturbs (default: all); the next direction takes
    the next ones, and what lies before and behind the blocks counts as a block. update: "sign"
    makes each step lr sign(g z), whatever the size of g; "conservative" keeps the one of W, W - lr
    g z and W + lr g z where the model's own loss is smallest, for three forwards more. per_rank:
    whether each rank of a data-parallel run has directions of its own. targets: the weights to
    train, biases and norms included (default: all that require gradients). backward: weights that
    are trained by backward instead, as without surgery. This takes one more forward, at W, whose
    output is returned.
    """

    thin: ClassVar[bool] = False  # whether directions of matrices are products of thin factors

    eps: float | None = None
    directions: int = 1
    noise: Kind = "rademacher"
    estimate: Estimate = "central"
    dense: bool = False
    blocks: int | None = None
    update: Update = "plain"
    per_rank: bool = False
    targets: Targets = None
    backward: Targets = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        good = self.eps is None or (math.isfinite(self.eps) and self.eps > 0)
        demand(good, self, f"eps={self.eps} must be positive.")
        demand(self.directions >= 1, self, f"directions={self.directions} must be at least 1.")
        good = self.blocks is None or self.blocks >= 1
        demand(good, self, f"blocks={self.blocks} must be at least 1.")

    def beside(self, name: str, owner: nn.Module, method: TwoPoint) -> Perturbation:
        """Return what stands beside one weight: by default z, dense."""
        return Perturbation(name=name, owner=owner, probe=method)

    def start(self, model: nn.Module) -> TwoPoint:
        """Choose the weights of a model; changes nothing. Raises TargetError, ModelError."""
        name: str = self.name  # pyright: ignore[reportAttributeAccessIssue] # set by @register
        reading = hf.wants_gradients(model)
        if reading is not None:
            raise ModelError(
                f"{name} trains by forwards alone, but AdaLoRA ({reading}) allocates its ranks by "
                "the gradients of its weights, which would be missing. Use LoraConfig instead of "
                "AdaLoraConfig, or a pass that trains by backward."
            )
        above = [] if self.backward is None else backward_of(model, self.backward, name)
        names = weights_of(model, self.targets, name, above)
        runs = neighbours(model, names)
        count = len(runs) if self.blocks is None else self.blocks
        most = f"blocks={count}, but the weights that are trained lie in {len(runs)} blocks."
        demand(count <= len(runs), self, most)
        starts = range(0, len(runs), count)
        groups = [set(itertools.chain(*runs[at : at + count])) for at in starts]
        method = TwoPoint(
            name=name,
            seed=self.seed,
            kind=self.noise,
            eps=self.eps if self.eps is not None else eps_of(names),
            directions=self.directions,
            estimate=self.estimate,
            dense=self.dense,
            update=self.update,
            per_rank=self.per_rank,
            ranks=rank_of_world()[1] if self.per_rank else 1,
            groups=len(groups),
        )
        self._check_update(method)
        first = model.get_parameter(names[0])
        count = self.directions * method.ranks
        scalars = nn.Parameter(torch.zeros(count, dtype=wide(first), device=first.device))
        for each in names:
            owner = model.get_submodule(each.rpartition(".")[0])
            z = self.beside(each, owner, method)
            z.group = next(i for i, group in enumerate(groups) if each in group)
            if self.dense:
                coordinate = coordinate_of(model, each)
                coordinate.beside = z
            else:
                rule = Mapped(map=z, covers=model.get_parameter(each).numel())
                coordinate = Coordinate(
                    weight=each, parameter=scalars, rule=rule, owner=owner, beside=z
                )
            method.weights.append(coordinate)
        method.choose()
        method.above += densely(model, above)
        return method

    def _check_update(self, method: TwoPoint) -> None:
        signs = self.noise == "rademacher" and not self.thin
        alone = method.slots <= method.groups and not self.dense
        demand(
            self.update != "conservative" or (method.slots == 1 and not self.dense),
            self,
            'update="conservative" looks along one direction for the best end of a step. Use '
            "directions=1, per_rank=False, dense=False.",
        )
        demand(
            self.update != "conservative" or self.backward is None,
            self,
            'update="conservative" does not go with backward=: those weights have made their step '
            "before that of the others is judged. Leave one of the two out.",
        )
        demand(
            self.update != "sign" or (signs and alone),
            self,
            'update="sign" needs one scalar for each weight, and directions of signs: directions=1 '
            '(one for each group of blocks), per_rank=False, noise="rademacher", and mezo or '
            "sparse_mezo. For the signs of other sums of g z, let the optimizer see these sums, "
            "dense=True without update=, and call p.grad.sign_() for each p in model.parameters() "
            "before its step.",
        )


@dataclass(frozen=True, kw_only=True)
class Decaying(ZerothOrder):
    """Options of passes that decay weights; see `ZerothOrder`.

    weight_decay: decoupled decay of matrices, multiplied by the learning rate (the optimizer's own
    decay would act on scalars that start from zero in each step).
    """

    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        good = math.isfinite(self.weight_decay) and self.weight_decay >= 0
        demand(good, self, f"weight_decay={self.weight_decay} must be >= 0.")
        demand(
            not self.weight_decay or self.update != "conservative",
            self,
            f'update="conservative" does not go with weight_decay={self.weight_decay}: the weights '
            "that are judged would not be those that are kept. Leave one of the two out.",
        )

    def start(self, model: nn.Module) -> TwoPoint:
        """Choose the weights of a model; changes nothing. Raises TargetError."""
        method = super().start(model)
        method.decays = True
        for each in method.weights:
            if each.mapped and model.get_parameter(each.weight).ndim > 1:
                each.mapped.weight_decay = self.weight_decay
        return method


def backward_of(model: nn.Module, targets: str | Sequence[str], what: str) -> list[str]:
    """Return the names of the weights to train by backward. Raises TargetError if there is none."""
    wanted = select(model, targets, "backward")
    found = [name for name in wanted if model.get_parameter(name).requires_grad]
    if not found:
        raise TargetError(
            f"{what}: no trainable weight among backward={targets!r}. Check that requires_grad was "
            "not switched off before surgery.apply."
        )
    for name in found:
        check_steps(name, model.get_parameter(name), what)
    return found


def weights_of(
    model: nn.Module, targets: Targets, what: str, above: Sequence[str] = ()
) -> list[str]:
    """Return the names of the weights to perturb. Raises TargetError if one cannot be.

    above: weights that are trained by backward.
    """
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    trained = [name for name in trained if name not in set(above)]
    wanted = trained if targets is None else select(model, targets, "targets")
    both = [name for name in wanted if name in set(above)]
    if both:
        raise TargetError(
            f"{what}: {listed(both)} is named in both targets= and backward=. A weight is trained "
            "either by forwards or by backward: leave it out of one of the two."
        )
    for name in wanted:
        weight = model.get_parameter(name)
        check_steps(name, weight, what)
        if not weight.is_contiguous():
            raise TargetError(
                f"{what}: {name} is not contiguous, its strides are {weight.stride()}. Write "
                "p.data = p.data.contiguous(), or leave it out of targets=."
            )
    chosen = [name for name in wanted if name in set(trained)]
    if not chosen:
        raise TargetError(
            f"{what}: no trainable weight among the targets. Check targets=, and that "
            "requires_grad was not switched off before surgery.apply."
        )
    return chosen


def neighbours(model: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """Cut names of weights, in the model's order, into its blocks and what lies between them."""
    block_of = {name: block for block, own in blocks(model).items() for name in own}
    return [list(run) for _, run in itertools.groupby(names, key=block_of.get)]


def eps_of(names: Iterable[str]) -> float:
    """Return the smallest eps that the kinds of these weights ask for."""
    found = {next((e for kind, e in EPS.items() if kind in name), 1e-3) for name in names}
    return min(found)
