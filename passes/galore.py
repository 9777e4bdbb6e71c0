"""GaLore: gradients in a subspace of their own directions. arXiv 2403.03507 (ICML 2024).

The gradient G = g^T x (out, in) of a Linear is projected to rank r on its smaller side,

    R = P^T G  (r, in)  if out < in,    R = G P  (out, r)  else,    P^T P = I,

P the top singular vectors of G, computed again every `period` steps. Any optimizer steps R, and its
change dR is added to W: W <- W + scale P dR, or W + scale dR P^T. Here R's gradient is computed as
(g P)^T x, or g^T (x P), so that G is never formed. P does not need it either: its randomised SVD
takes only thin products with G. Different weights renew P at different steps. Differences from the
published code: docs/passes/galore.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from surgery.passkit import (
    MORE,
    Coordinate,
    OneSided,
    OptimizerError,
    Run,
    Saved,
    Subspace,
    Targets,
    check_types,
    choose,
    demand,
    densely,
    from_zero,
    has_gradient,
    is_transposed,
    mapped_as,
    matrix_shape,
    moment,
    noise,
    reduce_linears,
    register,
    renamed,
    strongest,
    take,
    wide,
)


@register("galore")
@renamed(state="on_resample")
@dataclass(frozen=True, kw_only=True)
class Galore:
    """Options of GaLore.

    rank: the rank of the subspace (r). period: the number of optimizer steps after which a weight
    gets a new P. scale: a factor of the steps. projection: how P is computed: by a randomised SVD
    of the gradient ("randomised"), by an exact one ("svd", which forms G once a period and is
    slow), or at random ("random"). side: which side of W is projected: the smaller one ("auto"),
    "out" or "in". on_resample: what happens to the optimizer's state when P changes: it is kept as
    it is ("keep", as published), carried over into the new subspace ("project"), or dropped
    ("reset"). weight_decay: decoupled decay of W, multiplied by the learning rate of the group that
    holds R. always: weights that are trained densely as well. targets: weights of Linears (default:
    all in the repeated blocks; those with no more than `rank` channels on their smaller side are
    trained densely). Everything else is frozen.
    """

    saves = ("gradients", "optimizer")

    rank: int = 64
    period: int = 200
    scale: float = 0.25
    projection: Literal["randomised", "svd", "random"] = "randomised"
    side: Literal["auto", "out", "in"] = "auto"
    on_resample: Literal["keep", "project", "reset"] = "keep"
    weight_decay: float = 0.0
    always: str | Sequence[str] = ()
    targets: Targets = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        demand(self.rank >= 1, self, f"rank={self.rank} must be at least 1.")
        demand(self.period >= 1, self, f"period={self.period} must be at least 1 step.")
        positive = math.isfinite(self.scale) and self.scale > 0
        demand(positive, self, f"scale={self.scale} of the steps must be positive.")
        decay = math.isfinite(self.weight_decay) and self.weight_decay >= 0
        demand(decay, self, f"weight_decay={self.weight_decay} must be >= 0.")

    def start(self, model: nn.Module) -> Gradients:
        """Choose the weights of a model; changes nothing. Raises TargetError."""
        names, dense = choose(
            model,
            self.targets,
            self.always,
            "galore",
            "rank",
            self.rank,
            width=lambda model, name: min(matrix_shape(model.get_parameter(name))),
            channels="channels on its smaller side",
        )
        method = Gradients(options=self, total=sum(p.numel() for p in model.parameters()))
        for place, name in enumerate(names):
            weight = model.get_parameter(name)
            out, inputs = matrix_shape(weight)
            transposed = is_transposed(model.get_submodule(name.rpartition(".")[0]))
            out, inputs = (inputs, out) if transposed else (out, inputs)
            left = out < inputs if self.side == "auto" else self.side == "out"
            frame = Frame(
                name=name,
                method=method,
                turn=place * self.period // len(names),
                left=left,
                transposed=transposed,
                scale=self.scale,
                channels=out if left else inputs,
            )
            shape = (self.rank, inputs) if left else (out, self.rank)
            own = mapped_as(model, name, frame, shape, weight_decay=self.weight_decay)
            method.projected.append(own)
        method.always = densely(model, dense)
        return method


@dataclass(eq=False, kw_only=True)
class Gradients(Subspace):
    """The run-time state."""

    name: str = "galore"
    options: Galore
    rehearsal: bool = False

    @property
    def due(self) -> list[tuple[Coordinate, Frame]]:
        """Those whose P is made by the backward of the step under way."""
        return [(c, f) for c in self.projected if (f := frame_of(c)).due]

    def rewrite(self, graph: GraphModule, inputs: Sequence[Any], saved: Saved) -> None:
        reduce_linears(graph, inputs, {each.weight for each in self.projected})

    def before_forward(self, arguments: Mapping[str, Any], run: Run) -> None:
        self.rehearsal = run.rehearsal
        for each, frame in self.due:
            if not has_gradient(each, run.model):  # nothing of what P was made from has been kept
                frame.made = False

    def before_step(self, run: Run) -> None:
        moving = self.due if self.options.on_resample == "project" else []
        for each, frame in moving:
            if not frame.made or frame.old is None or frame.matrix is None:
                continue
            states = [s for o in run.optimizers if (s := o.state.get(each.parameter))]
            for state in states:
                project(state, frame.old, frame.matrix, frame.left)
            frame.old = frame.matrix if states else frame.old

    def after_step(self, run: Run) -> None:
        for _, frame in self.due:
            if frame.made:
                frame.due, frame.old = False, None
        period = self.options.period
        leaving = [c for c in self.projected if (run.step - frame_of(c).turn) % period == 0]
        for each in leaving:
            frame = frame_of(each)
            frame.due, frame.made, frame.old = True, False, frame.matrix
            from_zero(each, run)
            assert each.mapped is not None
            each.mapped.since = run.step
        if self.options.on_resample == "reset":
            run.forget(leaving)

    def state(self) -> dict[str, Any]:
        frames = [frame_of(each) for each in self.projected]
        known = {frame.name: frame.matrix for frame in frames if frame.matrix is not None}
        return {"P": known, "due": {frame.name: int(frame.due) for frame in frames}}

    def restore(self, state: Mapping[str, Any]) -> None:
        for each in self.projected:
            frame = frame_of(each)
            frame.matrix, frame.due = state["P"].get(frame.name), bool(state["due"][frame.name])
            frame.made, frame.old = False, frame.matrix

    def lines(self) -> Iterable[tuple[str, str]]:
        yield from super().lines()
        numbers = [frame_of(each).matrix for each in self.projected]
        held = sum(matrix.numel() for matrix in numbers if matrix is not None)
        yield "subspaces", f"{held:,} numbers, each renewed every {self.options.period} steps"


def frame_of(coordinate: Coordinate) -> Frame:
    assert isinstance(coordinate.beside, Frame)
    return coordinate.beside


@dataclass(eq=False, kw_only=True)
class Frame(OneSided):
    """P beside one weight.

    turn: at which step of a period it is renewed. due: to be renewed by the next gradient. made:
    whether that has happened, from gradients that are yet to be stepped. old: the P that the
    optimizer's state is of, meanwhile.
    """

    name: str
    method: Gradients
    turn: int
    left: bool
    transposed: bool
    scale: float
    channels: int
    matrix: Tensor | None = None
    due: bool = True
    made: bool = False
    old: Tensor | None = None
    by: ClassVar[str] = "galore"

    def frame_for(self, grad: Tensor, x: Tensor) -> Tensor:
        if self.matrix is not None and (not self.due or self.made):
            return self.matrix
        p = self._drawn(grad, x)
        if p is None:  # what is zero, or not finite, has no directions: the next one may
            return grad.new_zeros(self.channels, self.method.options.rank)
        if not self.method.rehearsal:
            self.matrix, self.made = p, True
        return p

    def _drawn(self, grad: Tensor, x: Tensor) -> Tensor | None:
        options, (a, b) = self.method.options, (grad, x) if self.left else (x, grad)
        side, other, rank = a.shape[1], b.shape[1], options.rank
        own = next(c.mapped for c in self.method.projected if c.beside is self)
        assert own is not None
        labels = (options.seed, "galore", self.name, own.since)
        if options.projection == "random":
            found = noise.orthonormal(noise.normal((side, rank), *labels))
            return found.to(x.device, wide(x)).contiguous()
        if options.projection == "svd":
            return strongest(a, b, rank, None)
        return strongest(a, b, rank, noise.normal((other, min(rank + MORE, side, other)), *labels))


# What optimizers call directions in R, and squares of them.
_FIRST = ("exp_avg", "momentum_buffer", "grad_avg", "z")
_SECOND = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


@torch.no_grad()
def project(state: dict[str, Any], old: Tensor, new: Tensor, left: bool) -> None:
    """Take moments of R from one subspace along into another, in place.

    With C = P_new^T P_old: m <- C m, v <- (C * C) v + (1 - sum_j (C * C)_ij) mean(v): what of a new
    direction lies outside of the old subspace is taken for as large as the old ones on average.
    """
    turn = new.double().t() @ old.double()
    squares = turn.square()
    rest = (1.0 - squares.sum(1)).clamp_(min=0.0)[:, None]
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.ndim != 2:
            continue  # a count
        if key not in (*_FIRST, *_SECOND):
            if 1 in value.shape:
                continue  # a factor
            raise OptimizerError(
                'galore: on_resample="project" does not know how to carry an '
                f"optimizer's {key!r} over into another subspace. "
                'Use on_resample="keep", as published, or "reset".'
            )
        now = moment(value) if left else moment(value).t()
        now = turn @ now if key in _FIRST else squares @ now + rest * now.mean(0, keepdim=True)
        take(value, (now if left else now.t()).to(value.dtype))
