"""Everything that one `surgery.apply` keeps: plain Python state beside the model."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.optim import Optimizer

from surgery import sharding
from surgery.capture import Dispatch, unreached
from surgery.carrying import carry
from surgery.compilers import Backend
from surgery.coordinates import TABLE, Piece, Site, unique
from surgery.distributed import average_replicated, check_cut, replicated, take_cut
from surgery.errors import ModelError, OptimizerError, SurgeryError
from surgery.gradients import finite, norms
from surgery.ledger import Ledger
from surgery.optimizers import check_fresh, check_membership, only_makes_state

LIVE: weakref.WeakSet[Surgery] = weakref.WeakSet()  # what the clock's global hooks serve


class Method:
    """The run-time state of one pass on one model, made by the pass's `start(model)`.

    pieces: every coordinate that may ever be trained; empty for exact rewrites. order: rewrites of
    a lower number come first; 1 works on what autograd would keep, 2 on how that is kept.
    """

    name: str
    pieces: Sequence[Piece] = ()
    order: int = 0
    alone: bool = False  # whether it replaces backward, so that other passes have nothing to do
    fixed: bool = False  # whether every step trains the same, so that a compiler may have its nodes

    def reread(self, graph: GraphModule) -> None:
        """Rewrite how one captured graph reads its weights, in place; before any `rewrite`."""

    def rewrite(self, graph: GraphModule, inputs: Sequence[Any], ledger: Ledger) -> None:
        """Rewrite one captured graph in place; its weights are read through gates already.

        ledger: autograd's account of the graph as it stands.
        """

    @property
    def rewrites(self) -> bool:
        return type(self).rewrite is not Method.rewrite

    def before_forward(self, arguments: Mapping[str, Any], rehearsal: bool) -> None:
        """Take the arguments of a training forward; a rehearsal (of `report`) leaves no trace."""

    def adopt(self, piece: Piece) -> bool:
        """Decide from now on when another pass's mapped coordinate is trained, in place of its
        weight; False if this pass does not sample, or not this weight as a whole."""
        return False

    def drive(self, run: Callable[[], Any], surgery: Surgery) -> Any:
        """Return the output of a training forward; `run` runs the captured one. Of passes that
        replace backward: `alone`."""
        return run()

    def check_reached(self) -> None:
        """After the first training forward: raise CaptureError if the rewrite did not happen."""

    def check(self, optimizer: Optimizer) -> None:
        """Raise OptimizerError if this optimizer, about to step first, cannot serve the pass."""

    def before_step(self) -> None:
        """Raise OptimizerError if the optimizer step about to be made would do nothing."""

    def after_step(self, surgery: Surgery) -> None:
        """Do what is due after an optimizer step; `surgery.step` steps have been made."""

    def state(self) -> dict[str, Any]:
        """Return what resuming needs besides weights and coordinates: tensors, numbers, strings,
        nested by name. What is drawn from seeds is left out."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned, right after `start` on a model of the same shapes."""

    def lines(self) -> Iterable[tuple[str, str]]:
        """Return what `report` says of the pass, as (label, value)."""
        return ()


@dataclass(eq=False, kw_only=True)
class Surgery:
    """One applied surgery: its passes, their coordinates, and the count of optimizer steps."""

    model: nn.Module
    passes: tuple[Any, ...]
    methods: tuple[Method, ...]
    sites: tuple[Site, ...]
    required_grad: list[tuple[nn.Module, str, bool]]  # flags before apply, for remove
    backend: Backend | None = None  # that compiles rewritten graphs
    dispatch: Dispatch = field(init=False)
    step: int = 0
    skipped: int = 0  # steps whose gradients were NaN or infinite
    captures: int = 0
    loss_scale: float = 1.0  # of the torch GradScaler that drives the step under way
    reached: bool = False
    optimizers: weakref.WeakSet[Optimizer] = field(default_factory=weakref.WeakSet)
    stepped: set[int] = field(default_factory=set)
    driving: list[Optimizer] = field(default_factory=list)  # that made the step under way
    refused: bool = False  # the step under way was skipped
    rehearsal: bool = False  # a forward of `report`, which must leave no trace
    before: dict[int, Tensor] = field(default_factory=dict)  # mapped coordinates before the step
    first: Piece | None = None  # that got a gradient in the backward under way
    fused: bool = False  # the optimizer takes gradients away while the backward is under way
    running: bool = False  # a training forward is under way
    forwards: int = 0  # training forwards since the last step
    cut: bool = False  # FSDP2 shards the model
    replicated: Sequence[Piece] = ()  # that each rank holds whole beside weights that FSDP2 cut
    taken: dict[str, int] = field(default_factory=dict)  # pass -> bytes its rewrites take away
    calls: list[tuple[GraphModule, Sequence[Any]]] | None = None  # graphs run, while one listens
    handles: list[Any] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        fresh = {"stepped": set(), "driving": [], "handles": [], "reached": False, "captures": 0}
        fresh |= {"before": {}, "taken": {}}
        return {k: v for k, v in (self.__dict__ | fresh).items() if k != "optimizers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"optimizers": weakref.WeakSet()}

    @property
    def pieces(self) -> list[Piece]:
        return [piece for site in self.sites for piece in site.pieces]

    def flags(self) -> list[tuple[nn.Parameter, bool]]:
        """Return the model's own parameters, each with its requires_grad before apply."""
        found = [(owner._parameters.get(key), flag) for owner, key, flag in self.required_grad]
        once = {
            id(parameter): (parameter, flag) for parameter, flag in found if parameter is not None
        }
        return list(once.values())

    # -- binding to the tensors of the model ---------------------------------------------------

    def bind(self, forward: bool = False) -> None:
        """Make sites and hooks point at the model's present parameters; cheap when they do.

        forward: whether a forward is under way, in which FSDP2 shows whole weights.
        """
        self.first = None
        for piece in self.pieces:
            if not piece.parameter.requires_grad:  # as get_peft_model leaves all but its own
                piece.parameter.requires_grad_(True)
        if self in LIVE and all(site.in_place() for site in self.sites):
            return
        self.release()
        twins = sharding.twins(self.model, forward)
        pieces = unique(self.pieces)
        check_cut(self.sites, twins)
        if twins:
            take_cut(pieces, self.pieces, self.model._modules.get(TABLE), twins)
        for site in self.sites:
            site.bind(twins)
        self.cut = bool(twins)
        self.replicated = replicated(pieces) if twins else ()
        for piece in pieces:
            hook = partial(_after_accumulate, weakref.ref(piece), weakref.ref(self))
            self.handles.append(piece.read.register_post_accumulate_grad_hook(hook))
        LIVE.add(self)

    def before_forward(self, plain: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Tell the passes that want to know with what the model is called."""
        wanting = [m for m in self.methods if type(m).before_forward is not Method.before_forward]
        if wanting:
            arguments = inspect.signature(plain).bind_partial(*args, **kwargs).arguments
            for method in wanting:
                method.before_forward(arguments, self.rehearsal)

    def drive(self, run: Callable[[], Any]) -> Any:
        """Return the output of a training forward; `run` runs the captured one."""
        for method in self.methods:
            if method.alone:
                return method.drive(run, self)
        return run()

    def release(self) -> None:
        """Take the hooks off and forget the sites."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for site in self.sites:
            site.release()
        LIVE.discard(self)

    def check_reached(self) -> None:
        """After the first training forward: raise if some weight was not read through a gate."""
        if self.reached:
            return
        missing = [site.name for site in self.sites if not site.reached]
        if missing:
            raise unreached(missing)
        for method in self.methods:
            method.check_reached()
        self.reached = True

    # -- the clock -------------------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer, loss_scale: float) -> None:
        """Check an optimizer at its first step; drop the gradients of a step that is not finite."""
        held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        if self.first is not None and any(id(p) in held for p in self.model.parameters()):
            raise OptimizerError(
                f"{type(optimizer).__name__} steps inside of a backward, before the gradients of "
                "all that is trained are there. Step after it; gradients are small under most "
                "passes. (LOMO: see surgery.step.)"
            )
        self.refused = not self.forwards and only_makes_state(optimizer)
        if self.refused:
            return
        if optimizer not in self.optimizers:
            if not any(id(p) in held for p in self.model.parameters()):
                return
            check_membership(self.pieces, optimizer, held)
            if not self.step:
                check_fresh(self.pieces, optimizer)
            for method in self.methods:
                method.check(optimizer)
            self.optimizers.add(optimizer)
        if (
            not self.reached
            and any(p.grad is not None for p in held.values())
            and not any(piece.parameter.grad is not None for piece in self.pieces)
        ):
            raise around("no gradient has reached a coordinate")
        for method in self.methods:
            method.before_step()
        self.loss_scale = loss_scale
        self.refused = not finite([p for p in unique(self.pieces) if id(p.parameter) in held])
        if self.refused:
            self.skipped += 1
            for parameter in held.values():
                parameter.grad = None
            return
        self.before = {
            id(piece.parameter): piece.parameter.detach().clone()
            for piece in self.pieces
            if piece.map is not None and piece.active and id(piece.parameter) in held
        }

    def after_step(self, optimizer: Optimizer) -> None:
        """Carry the step into the weights; count it once all coordinates have been stepped."""
        if optimizer not in self.optimizers or self.refused:
            return
        self._carry(optimizer)
        wanted = {id(piece.parameter) for piece in self.pieces}
        self.driving.append(optimizer)
        self.stepped |= {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not wanted <= self.stepped:
            return
        self.stepped.clear()
        self.step, self.forwards = self.step + 1, 0
        for method in self.methods:
            method.after_step(self)
        self.driving.clear()

    def _carry(self, optimizer: Optimizer) -> None:
        if not self.before:
            return
        rates = {id(p): float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}
        moved: dict[int, tuple[Tensor, Tensor]] = {}
        for piece in unique(self.pieces):
            key, now = id(piece.parameter), piece.parameter.detach()
            if key not in self.before:
                continue
            if piece.prox:
                now.mul_(1.0 - rates[key] * piece.prox)
            moved[key] = (sharding.whole(self.before[key]), sharding.whole(now))
        for site in self.sites:
            for piece in site.pieces:
                key, weight = id(piece.parameter), site.weight()
                if key in moved and weight is not None:
                    decay = rates[key] * piece.weight_decay
                    carry(piece, weight, *moved[key], self.step, decay)
        self.before = {}

    def end_backward(self) -> None:
        """Take the norm of every watched gradient: after backward, before anyone clips them."""
        first, self.first = self.first, None
        if first and first.twin is None and first.parameter.grad is None and not self.fused:
            raise OptimizerError(
                f"the gradient of {first.name} was taken away before backward had ended, without "
                "an optimizer's step(), so nobody knows what became of it. If this is LOMO: "
                "surgery.step(model, optimizer, lambda: optimizer.fused_backward(loss, lr))"
            )
        if self.replicated:
            average_replicated(self.replicated, self.sites)
        seen = [
            (piece, grad)
            for piece in self.pieces
            if piece.watched and piece.active and (grad := piece.parameter.grad) is not None
        ]
        found = norms([grad for _, grad in seen])
        for (piece, grad), norm in zip(seen, found, strict=True):
            piece.norm, piece.version = norm, sharding.version(grad)

    def forget(self, pieces: Iterable[Piece]) -> None:
        """Free the optimizer state and the gradients of coordinates that leave or enter."""
        for piece in pieces:
            piece.parameter.grad = None
            piece.norm = None
            for optimizer in self.optimizers:
                optimizer.state.pop(piece.parameter, None)


def _after_accumulate(
    piece_ref: weakref.ref[Piece], surgery_ref: weakref.ref[Surgery], parameter: Tensor
) -> None:
    piece, surgery = piece_ref(), surgery_ref()
    if piece is None or surgery is None:
        return
    if not piece.active:
        raise around(f"a gradient reached {piece.name}, which is not being trained now")
    if surgery.fused and piece.watched and parameter.grad is not None:
        (piece.norm,) = norms([parameter.grad])
    if surgery.first is None:
        surgery.first = piece
        # Twice: behind what DDP and FSDP2 queue, to put averaged gradients in place.
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: engine.queue_callback(surgery.end_backward))


def around(what: str) -> SurgeryError:
    """Return the error for a forward that was not ours."""
    return SurgeryError(
        f"{what}: the forward went around surgery. Call the model itself, model(...), and not one "
        "of its parts. If something has put its own forward in place of the model's (SFTTrainer of "
        "TRL does), apply surgery after it: surgery.apply(trainer.model, ...)."
    )


def surgery_of(model: nn.Module) -> Surgery | None:
    """Return the surgery that was applied to this model, or to a model inside of it."""
    for module in model.modules():
        forward = module.__dict__.get("forward")
        while forward is not None and not isinstance(forward, Dispatch):
            forward = getattr(forward, "__wrapped__", None)  # accelerate wraps it for autocast
        if forward is not None:
            return forward.surgery
    return None


def applied(model: nn.Module, example: str = "misa") -> Surgery:
    """Return the surgery that was applied to this model, or raise ModelError."""
    surgery = surgery_of(model)
    if surgery is None:
        raise ModelError(
            f"nothing was applied to this {type(model).__name__}. Call "
            f'surgery.apply(model, "{example}") first.'
        )
    return surgery
