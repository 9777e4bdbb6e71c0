"""RSO: training in random subspaces. arXiv 2502.07222 (ICML 2025).

In round k the weight W (out, in) of each Linear moves in a random subspace only,

    min over B (out, r) of f(W_k + B P_k) + prox / 2 ||B||^2,    W_{k+1} = W_k + B P_k,    B from 0

with any optimizer on B. P (r, in) is Gaussian N(0, 1/r), or sqrt(in/r) times an orthonormal frame,
uniformly random; both have E[P^T P] = I, so that Adam's usual learning rate transfers. Forward
keeps x P^T (rows, r) instead of x, and dB = g^T (x P^T) = dW P^T. The steps of B are added to W
as they are made: W is always the trained weight, and each round begins with a new P.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from surgery.passkit import (
    Coordinate,
    Projecting,
    Projection,
    Run,
    SurgeryError,
    Targets,
    check_types,
    choose,
    demand,
    densely,
    from_zero,
    inputs_of,
    is_transposed,
    local_state,
    mapped,
    moment,
    noise,
    register,
    renamed,
)


@register("rso")
@renamed(state="on_resample")
@dataclass(frozen=True, kw_only=True)
class Rso:
    """Options of RSO.

    rank: the rank of the subspace (r). period: the number of optimizer steps in a round.
    projection: the distribution of P, "gaussian" or "orthonormal". share: which weights share one
    P: all that read the same x (True), none (False), or all of the same input width ("width").
    on_resample: what happens to the optimizer's state of B at the end of a round: it is dropped
    ("reset"), carried over ("transport"), or changed by a function of (state, old P, new P). prox:
    decoupled decay of B, multiplied by the learning rate of the group that holds B. weight_decay:
    decoupled decay of W, multiplied by the same rate. always: weights that are trained densely as
    well. targets: weights of Linears (default: all in the repeated blocks, stacked experts
    included; those with no more than `rank` inputs are trained densely). Everything else is frozen.
    """

    saves = ("gradients", "optimizer", "activations")

    rank: int = 64
    period: int = 200
    projection: Literal["gaussian", "orthonormal"] = "gaussian"
    share: bool | Literal["width"] = True
    on_resample: str | Callable[..., None] = "reset"
    prox: float = 0.0
    weight_decay: float = 0.0
    always: str | Sequence[str] = ()
    targets: Targets = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        demand(self.rank >= 1, self, f"rank={self.rank} must be at least 1.")
        demand(self.period >= 1, self, f"period={self.period} must be at least 1 step.")
        given = self.on_resample
        known = callable(given) or given in ("reset", "transport")
        demand(known, self, f'on_resample={given!r} must be "reset", "transport" or a function.')
        for name in ("prox", "weight_decay"):
            value = getattr(self, name)
            demand(math.isfinite(value) and value >= 0, self, f"{name}={value} must be >= 0.")

    def start(self, model: nn.Module) -> Subspaces:
        """Choose the weights of a model; changes nothing. Raises TargetError."""
        names, dense = choose(
            model, self.targets, self.always, "rso", "rank", self.rank, stacked=True
        )
        method = Subspaces(
            options=self,
            total=sum(p.numel() for p in model.parameters()),
            named=self.targets is not None,
            period=self.period,
            shared=self.share is not False,
        )
        frames: dict[int, Frame] = {}
        for name in names:
            inputs = inputs_of(model, name)
            frame = Frame(name=name, inputs=inputs, method=method)
            if self.share == "width":
                frame = frames.setdefault(inputs, frame)
            owner = model.get_submodule(name.rpartition(".")[0])
            own = FrameMap(frame=frame, transposed=is_transposed(owner))
            method.projected.append(mapped(model, name, own, self.prox, self.weight_decay))
        method.always = densely(model, dense)
        return method


@dataclass(eq=False, kw_only=True)
class Subspaces(Projecting):
    name: str = "rso"
    options: Rso

    @property
    def frames(self) -> dict[int, Frame]:
        return {id(frame): frame for each in self.projected for frame in [frame_of(each)]}

    def redraw(self, run: Run) -> None:
        moves = {"reset": None, "transport": transport}
        state = self.options.on_resample
        move = moves[state] if isinstance(state, str) else state
        frames = self.frames
        old = {key: frame.matrix for key, frame in frames.items()}
        for frame in frames.values():
            frame.matrix = None
        for each in self.projected:
            from_zero(each, run)
            frame, before = frame_of(each), old[id(frame_of(each))]
            if move is None or before is None:
                continue
            frame.matrix = frame.draw().to(before) if frame.matrix is None else frame.matrix
            each.parameter.grad = None
            for optimizer in run.optimizers:
                held = optimizer.state.get(each.parameter)
                if held:  # rows are moved one by one: of those that this rank holds
                    move(local_state(held), before, frame.matrix)
        if move is None:
            run.forget(self.projected)

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        for frame in self.frames.values():  # drawn again from (seed, name, round)
            frame.matrix = None

    def lines(self) -> Iterable[tuple[str, str]]:
        yield from super().lines()
        frames = self.frames
        numbers = sum(frame.inputs * self.options.rank for frame in frames.values())
        yield "projections", f"{len(frames)}, {numbers:,} numbers, drawn again each round"


@torch.no_grad()
def transport(state: dict[str, Any], old: Tensor, new: Tensor) -> None:
    """Carry Adam's moments of B from one subspace into another, in place.

    First moments are sent through the old map and back through the new one, m P_old P_new^T r / in.
    Second moments become their mean over r: a fresh P makes all coordinates alike, and squaring the
    rotation would shrink them in each round.
    """
    turn = old.double() @ new.double().t() * (old.shape[0] / old.shape[1])
    for key, value in state.items():
        if key in ("exp_avg", "momentum_buffer", "z") and isinstance(value, Tensor):
            value.copy_(moment(value) @ turn)
        elif key in ("exp_avg_sq", "max_exp_avg_sq") and isinstance(value, Tensor):
            value.copy_(moment(value).mean(1, keepdim=True).expand_as(value))


@dataclass(eq=False, kw_only=True)
class Frame:
    """P (r, in), one for all weights that share it, named after the first of them."""

    name: str
    inputs: int
    method: Subspaces
    matrix: Tensor | None = None  # in the dtype of x: the same P for x P^T and for the steps

    def of(self, x: Tensor) -> Tensor:
        """Return P for x (rows, in), drawn if there is none yet."""
        if self.matrix is None:
            self.matrix = self.draw().to(x.device, x.dtype)
        if self.matrix.device != x.device:
            self.matrix = self.matrix.to(x.device)
        return self.matrix.to(x.dtype)

    def draw(self) -> Tensor:
        """Return the P of this round, a function of (seed, name, round), in float32."""
        options = self.method.options
        label = f"width {self.inputs}" if options.share == "width" else self.name
        shape = (options.rank, self.inputs)
        normal = noise.normal(shape, options.seed, "rso", label, self.method.round)
        if options.projection == "gaussian":
            return normal / math.sqrt(options.rank)
        frame = noise.orthonormal(normal.t())
        return (frame.t() * math.sqrt(self.inputs / options.rank)).float()


def frame_of(coordinate: Coordinate) -> Frame:
    assert isinstance(coordinate.beside, FrameMap)
    return coordinate.beside.frame


@dataclass(eq=False, kw_only=True)
class FrameMap(Projection):
    """x -> x P^T and B -> B P beside one weight."""

    frame: Frame
    transposed: bool
    by: ClassVar[str] = "rso"

    @property
    def origin(self) -> str:
        return self.frame.name

    @property
    def width(self) -> int:
        return self.frame.method.options.rank

    @property
    def size(self) -> tuple[int, ...]:
        return self.width, self.frame.inputs

    @property
    def drawn(self) -> Tensor | None:
        return self.frame.matrix

    def made_of(self, numbers: Tensor) -> FrameMap:
        return replace(self, frame=replace(self.frame, matrix=numbers))

    def share(self, other: Any) -> None:
        self.frame = other.frame

    def compress(self, rows: Tensor) -> Tensor:
        return rows @ self.frame.of(rows).t()

    def _frame(self, like: Tensor) -> Tensor:
        if self.frame.matrix is None:
            raise SurgeryError(
                f"rso: the projection P of {self.frame.name} is drawn in the next training "
                "forward, when it is known which weights read the same input. Run one first."
            )
        return self.frame.matrix.to(like)

    def expand(self, rows: Tensor) -> Tensor:
        return rows @ self._frame(rows)

    def pure(self) -> tuple[Any, ...] | None:
        return None if self.frame.matrix is None else (_product, self.frame.matrix)

    def add_into(self, matrix: Tensor, rows: Tensor) -> None:
        matrix.addmm_(rows, self._frame(rows))


def _product(_: Tensor, rows: Tensor, frame: Tensor) -> Tensor:
    return rows @ frame.to(rows)
