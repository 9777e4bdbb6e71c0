"""Functions compiled one by one: torch.compile of a kernel, and whether it works here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from functorch.compile import make_boxed_func  # pyright: ignore[reportPrivateImportUsage]
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch
from torch.fx import GraphModule
from torch.utils._python_dispatch import _disable_current_modes

from surgery.compat.dynamo import with_own_code


def compiled(function: Callable[..., Any], dynamic: bool | None, count: bool) -> Callable[..., Any]:
    """Return a function compiled by Inductor, with caches of its own.

    dynamic: one code for all shapes, or for those that it is called with first. count: traced in
    the same way and run as it is; each call is one `launched()` of the dispatch modes around it.
    """
    own = with_own_code(function)
    if count:
        backend: Any = aot_autograd(
            fw_compiler=_counted, bw_compiler=_counted, keep_inference_input_mutations=True
        )
        return torch.compile(own, backend=backend, dynamic=dynamic, fullgraph=True)
    # Or Inductor folds places times a 64-bit factor into an index, and writes that product to
    # Triton with 32-bit places: "Scalar ... is out of range for type int32".
    options = {"constant_and_index_propagation": False}
    made = torch.compile(own, dynamic=dynamic, fullgraph=True, options=options)
    fresh = [True]

    def run(*args: Any) -> Any:
        if not fresh:
            return made(*args)
        # What its forward keeps belongs to its backward otherwise, once: no retain_graph=True.
        with functorch.patch(donated_buffer=False):
            result = made(*args)
        fresh.clear()
        return result

    return run


def _counted(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with _disable_current_modes() as modes:
            result = graph(*args)
        for mode in modes:
            if (launched := getattr(mode, "launched", None)) is not None:
                launched()
        return result

    return make_boxed_func(run)


@lru_cache
def works(device: str) -> bool:
    """Whether Inductor makes kernels for a kind of device; warns once where it does not."""
    try:
        compiled(_probe, dynamic=True, count=False)(torch.ones(4, device=device))
    except Exception as error:  # of any compiler: no Triton, no C++, a GPU that is too old
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"torch.compile does not work for {device} here ({type(error).__name__}: {reason}). "
            "Kernels of surgery run operation by operation instead: several times slower where "
            "activations are computed again and 16-bit weights stepped. On an NVIDIA GPU, install "
            "triton; surgery.apply(..., compile=False) asks for this, without a warning.",
            stacklevel=3,
        )
        return False
    return True


def _probe(x: torch.Tensor) -> torch.Tensor:
    return (x * 2).relu()
