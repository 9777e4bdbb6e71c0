"""The way into the graph: a model's training forward, captured by Dynamo, rewritten, run eagerly.

`Dispatch` stands in the place of `model.forward`. Without gradients it calls the model's own
forward; with gradients, the captured one. Everything downstream (fx passes, nodes) is ours; only
the front end is `torch.compile(backend=...)`.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch.fx import GraphModule, Node
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY as _PRESERVED

from surgery import nodes
from surgery.compilers import check_backend, compiled, outer_backend
from surgery.coordinates import TABLE, site_of
from surgery.distributed import check_layout, check_wrapping
from surgery.errors import CaptureError, SurgeryError, listed
from surgery.ledger import Ledger
from surgery.reentrant import Workarounds
from surgery.sharding import is_cut_block
from surgery.simplify import simplify

if TYPE_CHECKING:
    from surgery.state import Method, Surgery

STRUCTURES = 64  # captures of one frame before giving up: distinct input structures, not shapes

# specialize_float: a float read from a module's globals would otherwise become an input of the
# graph, which fails inside checkpointed regions (GPT-2's GELU) in torch 2.13. optimize_ddp: would
# cut the graph at the buckets of DistributedDataParallel, and rewrites with it.
_DYNAMO = {
    "optimize_ddp": False,
    "specialize_float": True,
    "fail_on_recompile_limit_hit": True,
    "accumulated_recompile_limit": 1 << 16,
}


def _once() -> set[Any]:
    """transformers' advice that is logged once (by methods it adds to Logger): no graph break."""
    names = ("warning_once", "info_once")
    return {getattr(logging.Logger, name) for name in names if hasattr(logging.Logger, name)}


class Dispatch:
    """What `model.forward` is between `surgery.apply` and `surgery.remove`."""

    def __init__(self, model: nn.Module, surgery: Surgery) -> None:
        self.model = model
        self.surgery = surgery
        self.replaced: Callable[..., Any] | None = model.__dict__.get("forward")
        self.workarounds = Workarounds(model)
        self.leaves: dict[nn.Module, Leaf] = {}
        self._captured: Callable[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_captured": None}

    def install(self) -> None:
        """Take the place of `model.forward`."""
        self.model.__dict__["forward"] = self
        if isinstance(self.model, GraphModule):
            # Its deepcopy keeps only what is listed here.
            kept = self.model.meta.setdefault(_PRESERVED, {})
            kept["forward"] = self
            if TABLE in self.model._modules:
                kept[TABLE] = self.model._modules[TABLE]

    def uninstall(self) -> None:
        """Give the place back."""
        self.workarounds.restore()
        for module in self.leaves:
            del module.__dict__["forward"]
        self.leaves.clear()
        del self.model.__dict__["forward"]
        if self.replaced is not None:
            self.model.__dict__["forward"] = self.replaced
        if isinstance(self.model, GraphModule):
            kept = self.model.meta[_PRESERVED]
            kept.pop("forward", None)
            kept.pop(TABLE, None)
            if not kept:
                del self.model.meta[_PRESERVED]

    @property
    def plain(self) -> Callable[..., Any]:
        """The model's own forward."""
        return self.replaced or MethodType(type(self.model).forward, self.model)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.plain(*args, **kwargs)
        backend = outer_backend()
        if backend is None:
            return self._train(args, kwargs)
        if self.surgery.backend is None:
            check_backend(self.surgery.methods, backend)
            self.surgery.backend, self._captured = backend, None
        return self._train_alone(args, kwargs)

    def _train(self, args: Any, kwargs: Any) -> Any:
        self.workarounds.take_off()
        if not self.surgery.reached:  # once: each look costs a walk over all parameters
            check_layout(self.model)
        self.surgery.bind(forward=True)
        check_wrapping(self.surgery.pieces)
        self.surgery.before_forward(self.plain, args, kwargs)
        captured = self._captured or self._capture()
        if self.surgery.cut and not self.leaves:
            self.leaves = leaves(self.surgery, self._compiled)
        self.surgery.running = True
        self.surgery.forwards += not self.surgery.rehearsal
        try:
            with torch._dynamo.config.patch(_DYNAMO | {"ignore_logging_functions": _once()}):
                output = self.surgery.drive(lambda: captured(*args, **kwargs))
        except FailOnRecompileLimitHit as error:
            raise CaptureError(
                f"the forward of {type(self.model).__name__} was captured {STRUCTURES} times for "
                "different input structures, and Dynamo would now run it without the rewrite. The "
                "likely cause is a Python number, string or flag among the inputs that changes at "
                "each call: pass it as a tensor. TORCH_LOGS=recompiles names it."
            ) from error
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, SurgeryError):
                raise error.inner_exception from None
            raise
        finally:
            self.surgery.running = False
        self.surgery.check_reached()
        return output

    _train_alone: Any = torch._dynamo.disable(_train)  # for a torch.compile that is around us

    def _capture(self) -> Callable[..., Any]:
        self._captured = captured = self._compiled(self.plain)
        return captured

    def _compiled(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(  # pyright: ignore[reportCallIssue]
            forward,
            backend=_backend(self.surgery),
            dynamic=True,
            recompile_limit=STRUCTURES,
            isolate_recompiles=True,
        )


class Leaf:
    """What `module.forward` is of an embedding, a norm or a head outside of the blocks of FSDP2.

    Dynamo gives up the function that calls the blocks in a loop, for the hooks of FSDP2 inside of
    it, and does not look at modules of torch.nn that such a function calls.
    """

    def __init__(self, forward: Callable[..., Any], captured: Any, surgery: Surgery) -> None:
        self.forward, self.captured = forward, captured
        self.surgery = weakref.ref(surgery)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        surgery = self.surgery()
        running = surgery is not None and surgery.running
        return (self.captured if running else self.forward)(*args, **kwargs)


def leaves(surgery: Surgery, compiled: Callable[..., Any]) -> dict[nn.Module, Leaf]:
    """Put `Leaf` in place of the forward of modules whose weights a function given up may read."""
    inside = [m for m in surgery.model.modules() if m is not surgery.model and is_cut_block(m)]
    covered = {id(own) for block in inside for own in block.modules()}
    found: dict[nn.Module, Leaf] = {}
    for module in surgery.model.modules() if inside else ():
        reads = any(site_of(p) is not None for p in module.parameters(recurse=False))
        known = type(module).__module__.startswith("torch.nn.")
        if reads and known and id(module) not in covered and "forward" not in module.__dict__:
            forward = MethodType(type(module).forward, module)
            found[module] = Leaf(forward, compiled(forward), surgery)
            module.__dict__["forward"] = found[module]
    return found


def _backend(surgery: Surgery) -> Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]:
    # Weak: Dynamo's cache lives as long as the code object of the model's class does.
    alive = weakref.ref(surgery)

    def backend(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        owner = alive()
        if owner is not None:
            owner.captures += 1
            rewrite(graph, inputs, owner)
            if owner.backend is not None:
                return compiled(graph, inputs, owner.backend)

        def run(*args: Any) -> Any:
            listening = alive()
            if listening is not None and listening.calls is not None:
                listening.calls.append((graph, args))
            return graph.forward(*args)

        return run

    return backend


def rewrite(graph: GraphModule, inputs: Sequence[Any], surgery: Surgery) -> None:
    """Put the nodes of all passes into one captured graph, in place."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    reads = {
        node: value
        for node, value in zip(placeholders, inputs, strict=True)
        if isinstance(value, nn.Parameter)
    }
    _gate_reads(graph, list(reads))
    for body in [m for m in graph.modules() if isinstance(m, GraphModule)]:
        _restore_checkpoints(body)
        simplify(body)
        body.recompile()
    for method in surgery.methods:
        method.reread(graph)
    rewriting = sorted((m for m in surgery.methods if m.rewrites), key=lambda m: m.order)
    if rewriting:
        _apply(rewriting, graph, inputs, surgery.taken)
    graph.recompile()


def _apply(
    methods: Sequence[Method], graph: GraphModule, inputs: Sequence[Any], taken: dict[str, int]
) -> None:
    """Let the passes rewrite a graph in turn, and count the bytes that each takes away."""
    ledger = Ledger(graph, inputs)
    for method in methods:
        method.rewrite(graph, inputs, ledger)
        now = Ledger(graph, ledger.inputs, ledger.mode)
        taken[method.name] = taken.get(method.name, 0) + ledger.total - now.total
        ledger = now


def _gate_reads(graph: GraphModule, reads: list[Node]) -> None:
    # Every parameter, not only the targets: the graph may be reused for a layer whose weights are.
    first = next(node for node in graph.graph.nodes if node.op != "placeholder")
    for node in reads:
        with graph.graph.inserting_before(first):
            gated = graph.graph.call_function(nodes.gate, (node,))
        node.replace_all_uses_with(gated, delete_user_cb=lambda user, new=gated: user is not new)


def _restore_checkpoints(graph: GraphModule) -> None:
    for node in graph.graph.find_nodes(op="call_function", target=tag_activation_checkpoint):
        node.target = nodes.checkpointed


def unreached(names: list[str]) -> CaptureError:
    stacked = any("experts" in name for name in names)
    way = ' For stacked experts: model.set_experts_implementation("grouped_mm").' if stacked else ""
    return CaptureError(
        f"{len(names)} targeted weights were not reached by the rewrite in the first training "
        f"forward: {listed(names)}. Either this forward does not use them (leave them out with "
        "targets=...), or the part of the model that reads them could not be captured "
        "(TORCH_LOGS=graph_breaks names the line). Nothing was trained; surgery.remove(model) "
        f"restores the model.{way}"
    )
