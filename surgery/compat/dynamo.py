"""Dynamo as a front end: capturing a forward, who else compiles, where graphs come from."""

from __future__ import annotations

import inspect
import logging
import re
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import lru_cache
from typing import Any, TypeAlias
from unittest.mock import patch

import torch
import torch._dynamo
import torch._dynamo.utils
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._C._dynamo.guards import set_is_in_mode_without_ignore_compile_internals
from torch._dynamo import guards
from torch._dynamo.backends.registry import list_backends, lookup_backend
from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit
from torch._guards import detect_fake_mode
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _python_dispatch as dispatching

from surgery.compat.caches import forget
from surgery.errors import CaptureError, SurgeryError

Backend: TypeAlias = str | Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]

CHECKPOINT = tag_activation_checkpoint  # what a checkpointed region becomes in a captured graph

# specialize_float: a float read from a module's globals would otherwise become an input of the
# graph, which fails inside checkpointed regions (GPT-2's GELU) in torch 2.13. optimize_ddp: would
# cut the graph at the buckets of DistributedDataParallel, and rewrites with it.
# skip_nnmodule_hook_guards: hooks that are put on later would not be heard.
_SETTINGS = {
    "skip_nnmodule_hook_guards": False,
    "optimize_ddp": False,
    "specialize_float": True,
    "fail_on_recompile_limit_hit": True,
    "accumulated_recompile_limit": 1 << 16,
}


class LimitHit(Exception):
    """One frame was captured too often: Dynamo would run it without the rewrite from now on."""


def capture(
    forward: Callable[..., Any],
    backend: Callable[[GraphModule, Sequence[Any]], Callable[..., Any]],
    most: int,
) -> Callable[..., Any]:
    """Return a forward that gives each graph that Dynamo makes of it to a backend.

    It shares no cache with other captures of the same code, and the cache goes with it. most:
    captures of one frame before `capturing` raises LimitHit.
    """
    own = with_own_code(forward)
    symbols: weakref.WeakSet[Any] = weakref.WeakSet()

    def noting(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        mode = fake_mode_of(inputs)
        if mode is not None and mode.shape_env is not None:
            symbols.add(mode.shape_env)
        return backend(graph, inputs)

    options = {"recompile_limit": most, "isolate_recompiles": True} if _isolates() else {}
    made: Any = torch.compile(own, backend=noting, dynamic=True, **options)
    code = getattr(own, "__code__", None)  # of a method: its function's
    if code is not None:
        weakref.finalize(made, forget, code, symbols).atexit = False
    return made


@contextmanager
def capturing(most: int) -> Iterator[None]:
    """Set Dynamo up for running what `capture` returned, and turn its errors into plain ones.

    An error of this library that was raised in a backend comes out as itself. most: as there.
    """
    settings = _SETTINGS | {"ignore_logging_functions": _advice()}
    if not _isolates():
        settings["recompile_limit"] = most
    quiet = nullcontext()
    if _sorts_functions():
        quiet = patch.object(torch._dynamo.utils, _settings_logged().__name__, return_value="{}")
    try:
        with torch._dynamo.config.patch(settings), quiet, _reasons_found(), _under_modes():
            yield
    except FailOnRecompileLimitHit as error:
        raise LimitHit(str(error)) from error
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, SurgeryError):
            raise error.inner_exception from None
        raise


_ALIASING = "recompilation_reason_for_no_tensor_aliasing_guard"
_aliasing = getattr(guards, _ALIASING)


def _reasons(*args: Any) -> list[str]:
    with suppress(LookupError, AttributeError):
        return _aliasing(*args)
    return ["other arguments"]


def _reasons_found() -> AbstractContextManager[Any]:
    """Let Dynamo capture a call that is given less than an earlier one: when a tensor is given
    twice now, it looks among the arguments for all that were there then, and a KeyError ends it."""
    return patch.object(guards, _ALIASING, _reasons)


@contextmanager
def _under_modes() -> Iterator[None]:
    """Let Dynamo capture, and run what it has captured, under the dispatch modes of others.

    Under a mode that does not say `ignore_compile_internals` it would run the plain model.
    """
    stack = [
        torch._C._get_dispatch_stack_at(i) for i in range(torch._C._len_torch_dispatch_stack())
    ]
    others = [mode for mode in stack if "ignore_compile_internals" not in vars(mode)]
    if not others:
        yield
        return
    flag = dispatching._is_in_any_mode_without_ignore_compile_internals
    for mode in others:
        mode.ignore_compile_internals = lambda: True
    try:
        _say_in_modes(False)
        yield
    finally:
        _say_in_modes(flag)
        for mode in others:
            del mode.ignore_compile_internals


def _say_in_modes(flag: bool) -> None:
    dispatching._is_in_any_mode_without_ignore_compile_internals = flag
    set_is_in_mode_without_ignore_compile_internals(flag)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let no dispatch mode of others see what is done inside."""
    with dispatching._disable_current_modes():
        yield


def past(call: Callable[..., Any]) -> Any:
    """Return a function that Dynamo neither traces nor looks into."""
    return torch._dynamo.disable(call)


@lru_cache
def _isolates() -> bool:
    known = inspect.signature(torch.compile).parameters
    return "isolate_recompiles" in known and "recompile_limit" in known


def with_own_code(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same function with a code object of its own, by which Dynamo keeps its caches."""
    function = getattr(forward, "__func__", forward)
    if not isinstance(function, types.FunctionType):
        return forward
    code = function.__code__.replace()
    own = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    own.__kwdefaults__ = function.__kwdefaults__
    owner = getattr(forward, "__self__", None)
    return own if owner is None else types.MethodType(own, owner)


def _advice() -> set[Any]:
    """transformers' advice that is logged once (by methods it adds to Logger): no graph break."""
    names = ("warning_once", "info_once")
    return {getattr(logging.Logger, name) for name in names if hasattr(logging.Logger, name)}


@lru_cache
def _sorts_functions() -> bool:
    """Whether torch's log of its own settings sorts those functions, and logs that it cannot."""
    return "ignore_logging_functions" not in inspect.getsource(_settings_logged())


def _settings_logged() -> Callable[[], Any]:
    return torch._dynamo.utils._get_dynamo_config_for_logging


# -- backends --------------------------------------------------------------------------------------


def is_around(module: Any) -> bool:
    """Whether a module is what `torch.compile(model)` returns, with the model inside."""
    return isinstance(module, torch._dynamo.OptimizedModule)


def outer_backend() -> Backend | None:
    """Return the backend of a torch.compile around the model, None if there is none.

    Raises CaptureError while Dynamo traces us, which makes it give up and call us.
    """
    if torch.compiler.is_dynamo_compiling():
        raise CaptureError("surgery captures this model itself")
    made: Any = get_eval_frame_callback()
    if not callable(made):
        return None
    found: Any = made
    while (inner := getattr(found, "_torchdynamo_orig_backend", None)) is not None:
        found = inner
    if found is made:
        raise CaptureError(
            "torch.compile is around a model that surgery captures itself, and its backend cannot "
            'be found. Name the backend: surgery.apply(model, ..., backend="inductor").'
        )
    return found


def name_of_backend(backend: Backend) -> str:
    """Return what to call a backend; torch.compile wraps them."""
    known = getattr(backend, "compiler_name", None) or getattr(backend, "__name__", None)
    return backend if isinstance(backend, str) else str(known or type(backend).__name__)


def backends(hidden: bool = False) -> list[str]:
    """Return the names of the backends. hidden: those for debugging too."""
    return list_backends(exclude_tags=()) if hidden else list_backends()


def backend_named(backend: Backend) -> Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]:
    """Return a backend as a function."""
    return lookup_backend(backend) if isinstance(backend, str) else backend  # pyright: ignore[reportReturnType]


# -- captured graphs -------------------------------------------------------------------------------


def policy_of(body: GraphModule) -> Any:
    """Return the `context_fn=` of a captured checkpoint (selective checkpointing), or None."""
    return body.meta.get("_checkpoint_context_fn")


def fake_mode_of(inputs: Sequence[Any]) -> Any:
    """Return the mode of the tensors that a graph was captured with."""
    return detect_fake_mode(inputs)


def surely(condition: Any) -> bool:
    """Whether a condition on symbolic sizes holds for all of them."""
    return statically_known_true(condition)


def stack_of(node: Node) -> list[tuple[int, str]]:
    """Return the modules that a node was traced in, outermost first: id, and Dynamo's way there.

    The way is dotted, without the local variable that it begins with, whatever that is called: a
    forward may name its first argument otherwise than self.
    """
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    found = []
    for key, (path, _) in stack.items():
        number = key.partition("@")[0]
        found.append((int(number) if number.isdigit() else 0, _dotted(path)))
    return found


def _dotted(path: str) -> str:
    path = re.sub(r"^L\['[^']+'\]", "", path)
    path = re.sub(r"_modules\['([^']+)'\]|\['([^']+)'\]|\[(\d+)\]", r".\1\2\3", path)
    path = path.replace("__dict__._modules.", "")  # Dynamo's way through PEFT's models
    return ".".join(part for part in path.split(".") if part)


def copy_sources(graph: GraphModule, made: GraphModule, copied: Graph) -> None:
    """Let a copy of a graph know where its inputs came from, as AOTAutograd wants to."""
    if not hasattr(graph, "_param_name_to_source"):
        return
    made._param_name_to_source = graph._param_name_to_source
    for node, new in zip(graph.graph.nodes, copied.nodes, strict=True):
        if node.op == "placeholder":
            new._dynamo_source = node._dynamo_source


def without_source(placeholder: Node) -> None:
    """Mark an input that a graph has got beside those that Dynamo gave it."""
    placeholder._dynamo_source = None  # pyright: ignore[reportAttributeAccessIssue]
