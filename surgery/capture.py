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
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch.fx import GraphModule, Node
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY as _PRESERVED

from surgery import nodes
from surgery.coordinates import TABLE
from surgery.distributed import check_wrapping
from surgery.errors import CaptureError, listed
from surgery.ledger import Ledger
from surgery.reentrant import Workarounds
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
        self.workarounds.take_off()
        self.surgery.bind()
        check_wrapping(self.surgery.pieces)
        self.surgery.before_forward(self.plain, args, kwargs)
        captured = self._captured or self._capture()
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
        self.surgery.check_reached()
        return output

    def _capture(self) -> Callable[..., Any]:
        captured: Callable[..., Any] = torch.compile(  # pyright: ignore[reportCallIssue]
            self.plain,
            backend=_backend(self.surgery),
            dynamic=True,
            recompile_limit=STRUCTURES,
            isolate_recompiles=True,
        )
        self._captured = captured
        return captured


def _backend(surgery: Surgery) -> Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]:
    # Weak: Dynamo's cache lives as long as the code object of the model's class does.
    alive = weakref.ref(surgery)

    def backend(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        owner = alive()
        if owner is not None:
            owner.captures += 1
            rewrite(graph, inputs, owner)

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
