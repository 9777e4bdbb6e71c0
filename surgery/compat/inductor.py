"""Functions compiled one by one: traced, given to Inductor, and called past Dynamo's guards.

A call of what `torch.compile` returns costs 100 us and more of Python, as much as the kernels of a
small layer take; past Dynamo it costs 20 us. Whoever calls says what the code is right for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import SymInt, Tensor
from torch._functorch import config as functorch
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes

from surgery.compat.tensors import flatten, unflatten

# Inductor would fold places times a 64-bit factor into an index, and write that product to Triton
# with 32-bit places: "Scalar ... is out of range for type int32".
OPTIONS = {"constant_and_index_propagation": False}


def traced(
    function: Callable[..., Any], args: Sequence[Tensor | int], dynamic: bool
) -> tuple[GraphModule, Any]:
    """Return a function of tensors and integers as a graph of torch's operators, without autograd,
    and the structure of its result.

    dynamic: for all sizes and integers, as long as those that are equal now are, and those that are
    0 or 1 now; or for the present ones.
    """
    shape: list[Any] = []

    def flat(*given: Any) -> list[Any]:
        leaves, structure = flatten(function(*given))
        shape.append(structure)
        return leaves

    with _disable_current_modes(), torch.no_grad():
        graph = make_fx(flat, tracing_mode="symbolic" if dynamic else "fake")(*args)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph, shape[0]


@dataclass(frozen=True, eq=False, kw_only=True)
class Made:
    """What has been compiled, or is counted.

    placeholders: as they were traced. constant: the places of integers whose present values the
    code is for.
    """

    run: Callable[..., Any]
    placeholders: Sequence[Any]
    mode: FakeTensorMode
    constant: frozenset[int]

    def fits(self, args: Sequence[Tensor | int]) -> bool:
        """Whether the code is right for these sizes and integers too."""
        if any(int(self.placeholders[i]) != args[i] for i in self.constant):
            return False
        moving = [i for i in range(len(args)) if i not in self.constant]
        shapes: Any = self.mode.shape_env
        traced = [self.placeholders[i] for i in moving]
        return shapes.evaluate_guards_for_args(traced, [args[i] for i in moving])


def compiled(
    function: Callable[..., Any], args: Sequence[Tensor | int], dynamic: bool, count: bool
) -> Made:
    """Return a function of tensors and integers, compiled by Inductor; see `traced`.

    count: traced in the same way and run as it is; each call is one `launched()` of the dispatch
    modes around it.
    """
    graph, structure = traced(function, args, dynamic)
    places = zip(graph.graph.find_nodes(op="placeholder"), args, strict=True)
    values = [node.meta.get("val", given) for node, given in places]  # none of a constant
    mode = _mode_of(graph)
    if count:
        run = _counted(graph)
    else:
        # Here: importing it asks for the number of GPUs, after which no process may fork and use
        # one.
        from torch._inductor.compile_fx import compile_fx

        # Its key of graphs that no Dynamo has made cannot be pickled in torch 2.11; Inductor's can.
        off = functorch.patch(enable_autograd_cache=False)
        with _disable_current_modes(), torch.no_grad(), tracing(TracingContext(mode)), off:
            run: Any = compile_fx(graph, values, config_patches=OPTIONS)
    constant = {i for i, v in enumerate(values) if not _moves(v)} if dynamic else set[int]()
    return Made(
        run=_shaped(run, structure), placeholders=values, mode=mode, constant=frozenset(constant)
    )


def _moves(value: Any) -> bool:
    """Whether a placeholder may be another tensor, or another integer."""
    return isinstance(value, Tensor) or (
        isinstance(value, SymInt) and value.node.maybe_as_int() is None
    )


def _shaped(run: Callable[..., Any], structure: Any) -> Callable[..., Any]:
    """Return a function whose results, a flat list, come in a structure."""
    if structure.is_leaf():
        return lambda *given: run(*given)[0]
    if all(child.is_leaf() for child in structure.children()):
        return lambda *given: tuple(run(*given))
    return lambda *given: unflatten(run(*given), structure)


def _mode_of(graph: GraphModule) -> FakeTensorMode:
    for node in graph.graph.nodes:
        if isinstance(value := node.meta.get("val"), FakeTensor):
            return value.fake_mode
    return FakeTensorMode(shape_env=ShapeEnv())


def _counted(graph: GraphModule) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with _disable_current_modes() as modes, torch.no_grad():
            result = graph(*args)
        for mode in modes:
            if (launched := getattr(mode, "launched", None)) is not None:
                launched()
        return result

    return run


def reason(error: Exception) -> str:
    """Return what an error of a compiler says, in one line."""
    first, _, _ = str(error).strip().partition("\n")
    return f"{type(error).__name__}: {first}"


@lru_cache
def works(device: str) -> bool:
    """Whether Inductor makes kernels for a kind of device; warns once where it does not."""
    try:
        ones = torch.ones(4, device=device)
        compiled(_probe, [ones], dynamic=True, count=False).run(ones)
    except Exception as error:  # of any compiler: no Triton, no C++, a GPU that is too old
        warnings.warn(
            f"torch.compile does not work for {device} here ({reason(error)}). "
            "Kernels of surgery run operation by operation instead, which is several times slower "
            "where activations are recomputed and 16-bit weights are stepped. On an NVIDIA GPU, "
            "install triton. surgery.apply(..., compile=False) does the same without a warning.",
            stacklevel=3,
        )
        return False
    return True


def _probe(x: torch.Tensor) -> torch.Tensor:
    return (x * 2).relu()
