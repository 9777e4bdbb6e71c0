"""One training step, foreseen: forward, loss, backward, clipping, optimizer."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.optim import Optimizer

from surgery.compat.fsdp import held_of, stays_out_of_ddp
from surgery.compat.stage import Stage, staged
from surgery.compat.tensors import inside
from surgery.compat.uncompiled import uncompiled
from surgery.engine.decide import decide
from surgery.engine.surgery import Surgery
from surgery.errors import OptionError
from surgery.graph.reading import module_of
from surgery.kernels import plan
from surgery.memory import loss_of
from surgery.prediction.devices import Device
from surgery.prediction.optimizers import Making, check_making, made_for
from surgery.prediction.skeleton import hollow, skeleton
from surgery.prediction.timeline import Holder, Kind, Phase, Timeline
from surgery.weights.targets import blocks

Wrap = Literal["fsdp2", "ddp"]


def own_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the loss that a model computes itself."""
    return loss_of(model(**batch))


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The loop around a model, as far as its memory is concerned.

    loss: of (model, batch). optimizer: makes one of parameters. clip: norm that gradients are
    clipped to. autocast: dtype. device: None counts bytes as on a CPU. prepare: is given the model
    before anything else. world: processes, of which this is the first. wrap: what they share.
    """

    loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] = own_loss
    optimizer: Making = torch.optim.AdamW
    clip: float | None = None
    autocast: torch.dtype | None = None
    device: Device | None = None
    prepare: Callable[[Any], Any] | None = None
    world: int = 1
    wrap: Wrap = "fsdp2"

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise OptionError(f"clip={self.clip!r} must be a positive norm, or None.")
        if self.autocast is not None and not isinstance(self.autocast, torch.dtype):
            raise OptionError(f"autocast={self.autocast!r} is not a dtype such as torch.bfloat16.")
        check_making(self.optimizer)


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step holds, in bytes. start: before it, optimizer state included. held: before it, by
    kind; of gradients and optimizer, the most meanwhile. activations: that forward leaves for
    backward. peak: the most at a time, in `phase`. holders: of the peak. course: bytes by kind,
    after each allocation. milliseconds: None without a device. said: of each pass that rewrites, by
    its name: what it reports of the graphs that it has rewritten."""

    start: int
    held: Mapping[Kind, int]
    activations: int
    peak: int
    phase: Phase
    holders: tuple[Holder, ...]
    course: Sequence[tuple[Phase | None, Mapping[Kind, int]]]
    milliseconds: float | None
    launches: int
    said: Mapping[str, Sequence[tuple[str, str]]]

    def most(self, phase: Phase) -> int:
        """Return the most bytes at a time in one phase."""
        return max((sum(held.values()) for when, held in self.course if when == phase), default=0)


def foresee(model: nn.Module, batch: Mapping[str, Any], passes: Sequence[Any], loop: Loop) -> Step:
    """Play the second step of a run, when the optimizer has its state.

    passes: checked options; none for the plain model. Changes nothing; raises what `apply` and
    the model's own forward raise.
    """
    timeline = Timeline(loop.device)
    stage = Stage(timeline)
    with (
        warnings.catch_warnings(action="ignore"),  # of a run that is none
        _sizes_of(loop.device),
        _shared(loop, stage) as prepare,
        put_on(stage, model, batch, passes, _compiling(loop.device), prepare) as played,
    ):
        copy, inputs, surgery = played
        buckets = _buckets(copy) if loop.wrap == "ddp" and loop.world > 1 else []
        timeline.call("gradients", map(stage.key_of, buckets))
        timeline.call("batch", map(stage.key_of, _parts(inputs.values())))
        held = [*copy.parameters(), *copy.buffers()]
        timeline.call("weights", map(stage.key_of, _parts(held)))
        with _naming(copy, surgery, timeline):
            trained = [p for p in copy.parameters() if p.requires_grad]
            optimizer = made_for(loop.device, loop.optimizer, trained)
            _step(copy, inputs, optimizer, loop, timeline, stage)
            gc.collect()  # captures leave circles behind, with tensors in them
            timeline.begin()
            first = timeline.alive()
            start = timeline.live()
            state = [v for held in optimizer.state.values() for v in held.values()]
            timeline.call("optimizer", map(stage.key_of, _parts(state)))
            timeline.call("weights", map(stage.key_of, _parts(copy.parameters())))
            activations = _step(copy, inputs, optimizer, loop, timeline, stage)
        said = _said(surgery) if surgery is not None else {}
    peak, phase, holders = timeline.peak()
    workspace = loop.device.workspace if loop.device is not None else 0
    return Step(
        start=start,
        held=timeline.held(first),
        activations=activations - start,
        peak=peak + workspace,
        phase=phase,
        holders=holders,
        course=timeline.course(),
        milliseconds=1e3 * timeline.seconds if loop.device is not None else None,
        launches=timeline.launches,
        said=said,
    )


@contextmanager
def _shared(loop: Loop, stage: Stage) -> Iterator[Callable[[Any], Any] | None]:
    """Give what prepares a model, be one of the loop's processes meanwhile."""
    if loop.world == 1 or loop.wrap == "ddp":
        yield loop.prepare
        return
    from surgery.compat import world

    with world.one_of(loop.world) as mesh, world.resizing(stage.resized):

        def prepare(model: nn.Module) -> None:
            if loop.prepare is not None:
                loop.prepare(model)
            world.shard(model, blocks(model), mesh)

        yield prepare


def _buckets(model: nn.Module) -> list[Tensor]:
    """Return the like of what a DistributedDataParallel gathers gradients in."""
    out = stays_out_of_ddp(model)
    trained = [p for name, p in model.named_parameters() if p.requires_grad and name not in out]
    return [torch.empty_like(p, memory_format=torch.contiguous_format) for p in trained]


@contextmanager
def put_on(
    stage: Stage,
    model: nn.Module,
    batch: Mapping[str, Any],
    passes: Sequence[Any],
    compile: plan.Compile = False,
    prepare: Callable[[Any], Any] | None = None,
) -> Iterator[tuple[nn.Module, dict[str, Any], Surgery | None]]:
    """Give a copy of a model and a batch on a stage, with passes applied, while it plays."""
    with staged(stage), torch.random.fork_rng([]):
        copy, inputs = skeleton(model), hollow(batch)
        for name, t in batch.items():
            if isinstance(t, Tensor):
                stage.known.keep(inputs[name], t)
        if prepare is not None:
            prepare(copy)
        if not passes:
            with uncompiled():
                yield copy, inputs, None
            return
        surgery = Surgery(decide(copy, passes, compile=compile))
        surgery.install()
        try:
            yield copy, inputs, surgery
        finally:
            surgery.uninstall()


def _step(
    model: nn.Module,
    batch: Mapping[str, Any],
    optimizer: Optimizer,
    loop: Loop,
    timeline: Timeline,
    stage: Stage,
) -> int:
    """Make a step; return the bytes that are alive between forward and backward."""
    with timeline.during("forward"), _autocast(loop.autocast):
        loss = loop.loss(model, batch)
        timeline.end_forward()
    live = timeline.live()
    with timeline.during("backward"):
        loss.backward()
    del loss
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    timeline.call("gradients", map(stage.key_of, grads))
    del grads
    with timeline.during("step"), uncompiled():
        if loop.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), loop.clip)
        optimizer.step()
        optimizer.zero_grad()
    return live


def _said(surgery: Surgery) -> dict[str, tuple[tuple[str, str], ...]]:
    # What trains coordinates reports of steps and rounds, too, and none was made.
    rewriting = [m for m in surgery.decision.rewriting if not m.coordinates]
    return {method.name: tuple(method.lines()) for method in rewriting}


def _parts(values: Iterable[Any]) -> Iterator[Tensor]:
    """Return the tensors with memory: of a quantised one, those that it is made of."""
    tensors = (held_of(value) for value in values if isinstance(value, Tensor))
    return (part for t in tensors for part in inside(t))


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def _sizes_of(device: Device | None) -> AbstractContextManager[Any]:
    if device is None or not device.accelerator:
        return nullcontext()
    return plan.forced("accelerator", count=False)


def _compiling(device: Device | None) -> plan.Compile:
    return "auto" if device is not None and device.accelerator else False


@contextmanager
def _naming(model: nn.Module, surgery: Surgery | None, timeline: Timeline) -> Iterator[None]:
    """Tell the timeline whose operations come next: of which module, blocks numbered *."""
    if surgery is not None:
        with surgery.dispatch.running_by(
            lambda graph, inputs: _Named(graph, timeline).run(*inputs)
        ):
            yield
        return
    handles = []
    for name, module in model.named_modules():
        # No stack, nor always_call=True: a checkpoint ends the forward that it repeats by an error,
        # and the frames of a hook that runs on errors would keep what it has made alive.
        inside, outside = _numbered(name), _numbered(name.rpartition(".")[0])
        handles += [
            module.register_forward_pre_hook(lambda *_, where=inside: timeline.at(where)),
            module.register_forward_hook(lambda *_, where=outside: timeline.at(where)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Named(Interpreter):
    def __init__(self, graph: GraphModule, timeline: Timeline) -> None:
        super().__init__(graph)
        self.timeline = timeline

    def run_node(self, n: Node) -> Any:
        if n.op not in ("placeholder", "output"):
            self.timeline.at(_numbered(module_of(n)))
        result = super().run_node(n)
        # What nobody uses is freed at once by the code of a graph, and kept by an Interpreter.
        return result if n.users or n.op == "output" else None


def _numbered(path: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in path.split("."))
