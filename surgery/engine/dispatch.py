"""The way into the graph: a model's training forward, captured by Dynamo, rewritten, run eagerly.

`Dispatch` stands in the place of `model.forward`. Without gradients it calls the model's own
forward; with gradients, the captured one. Everything downstream (fx passes, nodes) is ours; only
the front end is `torch.compile(backend=...)`.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from surgery.compat import dynamo, fsdp, modules
from surgery.compat.autograd import is_transformed
from surgery.compat.tensors import each as each_leaf
from surgery.compat.tensors import leaves
from surgery.contract.method import overrides
from surgery.engine import captures
from surgery.engine.captures import Capture, capture_of, is_running, running
from surgery.engine.compile import check_backend, compiled
from surgery.engine.coverage import again
from surgery.engine.exhausted import remembered
from surgery.engine.finding import Forward
from surgery.engine.guards import check_layout, check_wrapping, joined, unreached
from surgery.engine.leaves import Leaf, can_be_leaf, outside_of_blocks, put_leaves
from surgery.engine.rewrite import rewrite
from surgery.errors import CaptureError
from surgery.graph.nodes import anchor
from surgery.graph.reading import name_modules
from surgery.kernels import plan
from surgery.weights.copies import accept
from surgery.weights.sites import Site
from surgery.weights.table import TABLE

if TYPE_CHECKING:
    from surgery.engine.surgery import Surgery


@dataclass(frozen=True, kw_only=True)
class Captured:
    """One captured graph. graph: weak, as it is rewritten now. before: its code as captured."""

    graph: Callable[[], GraphModule | None]
    before: str


class Dispatch(Forward):
    """What `model.forward` is between `surgery.apply` and `surgery.remove`.

    captures: graphs captured so far. taken: pass -> bytes that its rewrites take away. run: runs
    a graph with its inputs.
    """

    def __init__(self, surgery: Surgery) -> None:
        self.surgery = surgery
        self.model = surgery.decision.model
        self.backend = surgery.decision.backend
        self.replaced: Callable[..., Any] | None = self.model.__dict__.get("forward")
        self.leaves: dict[nn.Module, Leaf] = {}
        self._fresh()

    def _fresh(self) -> None:
        self.captures = self.pieces = 0
        self.taken: dict[str, int] = {}
        self.graphs: list[Captured] = []
        self.run = _forward
        self._captured: Callable[..., Any] | None = None
        self._shared: Capture | None = None
        self._around: Callable[[], Any] = lambda: None
        self._others = captures.Others()

    def __getstate__(self) -> dict[str, Any]:
        own = ("captures", "pieces", "taken", "graphs", "run", "_captured", "_shared", "_around")
        own += ("_others",)
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._fresh()

    @contextmanager
    def running_by(self, run: Callable[[GraphModule, Sequence[Any]], Any]) -> Iterator[None]:
        """Run graphs by a function inside."""
        self.run = run
        try:
            yield
        finally:
            self.run = _forward

    @contextmanager
    def listening(self) -> Iterator[list[tuple[GraphModule, Sequence[Any]]]]:
        """Give the graphs that autograd follows inside, with their inputs."""
        found = []

        def heard(graph: GraphModule, inputs: Sequence[Any]) -> Any:
            if torch.is_grad_enabled():
                found.append((graph, inputs))
            return _forward(graph, inputs)

        with self.running_by(heard):
            yield found

    def install(self) -> None:
        """Take the place of `model.forward`."""
        self.model.__dict__["forward"] = self
        modules.keep(self.model, "forward", self)
        table = modules.child(self.model, TABLE)
        if table is not None:
            modules.keep(self.model, TABLE, table)

    def uninstall(self) -> None:
        """Give the place back."""
        self.surgery.decision.workarounds.restore()
        for module in self.leaves:
            del module.__dict__["forward"]
        self.leaves.clear()
        self.model.__dict__.pop("forward", None)
        if self.replaced is not None:
            self.model.__dict__["forward"] = self.replaced
        modules.drop(self.model, "forward")
        modules.drop(self.model, TABLE)

    @property
    def plain(self) -> Callable[..., Any]:
        """The model's own forward."""
        return self.replaced or MethodType(type(self.model).forward, self.model)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            self.surgery.keep_up()
            return self.plain(*args, **kwargs)
        backend = dynamo.outer_backend()
        if backend is None:
            with remembered(self.surgery, args, kwargs):
                return self._train(args, kwargs)
        if self.backend is None:
            check_backend(self.surgery.decision.methods, backend)
            self.backend, self._captured = backend, None
        return self._train_alone(args, kwargs)

    def _train(self, args: Any, kwargs: Any) -> Any:
        surgery, decision = self.surgery, self.surgery.decision
        if is_transformed() or surgery.binding.swapped():  # of tensors that are no weights of ours
            surgery.keep_up()
            return self.plain(*args, **kwargs)
        decision.workarounds.take_off()
        if not surgery.coverage.complete:  # once: each look costs a walk over all parameters
            check_layout(self.model)
        self._level()
        surgery.bind(forward=True)
        check_wrapping(decision.coordinates)
        self._tell(args, kwargs)
        self._hear_all()
        if self._captured is None:
            self._captured = self._capture()
            self.leaves = self._put_leaves(self.leaves)  # of a copy
        if surgery.binding.cut and not self.leaves:
            self.leaves = self._put_leaves(outside_of_blocks(self.model))
            self._go_on_alone()
        plan.compile_for(decision.compile)
        surgery.clock.forward()
        before = surgery.coverage.before()
        output = self._run(self._captured, args, kwargs)
        plain = partial(self.plain, *args, **kwargs)
        try:
            lost = surgery.coverage.after(before, plain, self.captures)
            if not lost:
                return self._anchored(output)
            self._capture_alone(lost)
        except CaptureError:
            # Nothing of its own in what was captured: a head stands in a loop over cut blocks.
            outside = outside_of_blocks(self.model, trained=False)  # none that is a leaf already
            if not outside:
                raise
            self.leaves |= self._put_leaves(outside)
            self._go_on_alone()
        with again(self.model, before):
            output = self._run(self._captured, args, kwargs)
        lost = surgery.coverage.after(before, plain, self.captures)
        if lost:
            raise unreached([site.name for site in lost])
        return self._anchored(output)

    def _hear_all(self) -> None:
        """Go on with the capture under the global hooks, and forwards of classes, of now."""
        found = self._others.renewed(self.model, (self._captured, self._shared))
        if found is not None:
            self._captured, self._shared = found
            self.leaves = self._put_leaves(self.leaves)
            self.surgery.coverage.begin()

    def _level(self) -> None:
        """Let the weights that a DistributedDataParallel leaves out be the same on all ranks."""
        wrapper = fsdp.ddp_around()
        if wrapper is not None and fsdp.joins(wrapper):
            raise joined()
        if wrapper is not None and self._around() is not wrapper:
            self._around = weakref.ref(wrapper)
            sites = self.surgery.decision.sites
            fsdp.level(wrapper, [site.current().detach() for site in sites if not site.whole])
            for site in sites:  # it has written all else
                for each in site.coordinates:
                    accept(site, each, self.surgery.clock.step)

    def _anchored(self, output: Any) -> Any:
        """Return an output that backward can begin at, also where it depends on nothing trained:
        a layer was dropped, no token came to an expert, or this round's weights are frozen."""
        open = [each for each in self.surgery.decision.coordinates if not each.frozen]
        if not open or any(isinstance(t, Tensor) and t.requires_grad for t in leaves(output)):
            return output
        self.surgery.clock.note_idle()
        return each_leaf(partial(anchor, open[0].read), output)

    def _capture_alone(self, lost: Sequence[Site]) -> None:
        """Capture the modules of weights that a forward has lost by themselves, if they can be."""
        owners = list({id(site.owner): site.owner for site in lost}.values())
        if not all(map(can_be_leaf, owners)):
            raise unreached([site.name for site in lost])
        self.leaves |= self._put_leaves(owners)
        self._go_on_alone()

    def _put_leaves(self, modules: Iterable[nn.Module]) -> dict[nn.Module, Leaf]:
        return put_leaves(modules, self._compiled, partial(_is_running, weakref.ref(self)))

    _train_alone: Any = dynamo.past(_train)  # for a torch.compile that is around us

    def _tell(self, args: Any, kwargs: Any) -> None:
        """Tell the passes that want to know with what the model is called."""
        methods = self.surgery.decision.methods
        wanting = [method for method in methods if overrides(method, "before_forward")]
        if wanting:
            arguments = inspect.signature(self.plain).bind_partial(*args, **kwargs).arguments
            for method in wanting:
                method.before_forward(arguments, self.surgery.clock)

    def _run(self, captured: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return the output of a training forward."""
        driving = [m for m in self.surgery.decision.methods if overrides(m, "drive")]
        most = captures.STRUCTURES

        def forward() -> Any:  # passes may call it again, until the step
            alone = self.backend is not None
            shown = nullcontext() if alone else self.surgery.binding.as_applied()
            with dynamo.capturing(most), modules.unwatched(), running(self), shown:
                self.pieces = 0
                return captured(*args, **kwargs)

        try:
            output = driving[0].drive(forward, self.surgery.clock) if driving else forward()
        except dynamo.LimitHit as error:
            raise CaptureError(
                f"the forward of {type(self.model).__name__} was captured {most} times for "
                "different input structures, and Dynamo would now run it without the rewrite. The "
                "likely cause is a Python number, string or flag among the inputs, or an attribute "
                "of a module (a dropout rate that is annealed), that changes at each call: make it "
                "a tensor, or change it less often. TORCH_LOGS=recompiles names it."
            ) from error
        if self._shared is not None and not self._shared.serves(self.pieces):
            self._go_on_alone()
        return output

    def _capture(self) -> Callable[..., Any]:
        """Return the model's forward, captured: with others of its kind where that can be."""
        alone = self.replaced is not None or self.backend is not None or bool(self.leaves)
        self._shared = None if alone else capture_of(self.model, self._others.now)
        if self._shared is None:
            return self._compiled(self.plain)
        return partial(self._shared.run, self.model)

    def _go_on_alone(self) -> None:
        """Leave a shared capture: this model's forward is not what the others' is any more."""
        if self._shared is not None:
            self._captured, self._shared = self._compiled(self.plain), None

    def rewritten(self, graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Rewrite a graph, in place, and return what runs it."""
        self.captures += 1
        self.graphs.append(Captured(graph=weakref.ref(graph), before=graph.code))
        rewrite(graph, inputs, self.surgery.decision, self.taken)
        if self.backend is not None:
            return compiled(graph, inputs, self.backend)
        return partial(_run, weakref.ref(self), graph)

    def _compiled(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        # Weak: Dynamo's cache lives as long as the code object of the model's class does.
        return dynamo.capture(forward, partial(_captured, weakref.ref(self)), captures.STRUCTURES)


def _is_running(dispatch: weakref.ref[Dispatch]) -> bool:
    alive = dispatch()
    return alive is not None and is_running(alive)


def _captured(
    dispatch: weakref.ref[Dispatch], graph: GraphModule, inputs: Sequence[Any]
) -> Callable[..., Any]:
    """Rewrite a graph that Dynamo has captured, and return what runs it."""
    owner = dispatch()
    if owner is None:
        return graph.forward
    name_modules(graph, owner.model)
    return owner.rewritten(graph, inputs)


def _run(dispatch: weakref.ref[Dispatch], graph: GraphModule, *inputs: Any) -> Any:
    owner = dispatch()
    return (_forward if owner is None else owner.run)(graph, inputs)


def _forward(graph: GraphModule, inputs: Sequence[Any]) -> Any:
    return graph.forward(*inputs)
