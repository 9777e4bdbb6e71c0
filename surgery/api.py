"""The verbs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from surgery.catalogue import resolve
from surgery.compat.dynamo import Backend
from surgery.engine import hearing
from surgery.engine.decide import decide
from surgery.engine.finding import applied
from surgery.engine.surgery import Surgery
from surgery.errors import OptimizerError, OptionError, near_misses
from surgery.kernels.plan import Compile
from surgery.ranks import rank_of_world
from surgery.reports import code, measured
from surgery.reports.fitting import fit
from surgery.reports.table import Report
from surgery.weights.coordinate import Coordinates
from surgery.weights.sites import describe


def apply(
    model: nn.Module,
    spec: Any,
    *,
    backend: Backend | None = None,
    compile: Compile = "auto",
    **options: Any,
) -> nn.Module:
    """Rewrite a model in place, so that any plain loop trains it by the given passes.

    Build the optimizer afterwards. Returns the same model.

    model: a PyTorch or Hugging Face model with its weights loaded. spec: the name of a pass, an
    instance from `passes`, or a list of these. "auto" applies what `surgery.fit` recommends and
    takes the arguments of `fit` (`batch=`, and `memory=` or `device=`). Each pass says after which
    others it rewrites the graph (`Method.after`); the rest keep the order given. options: the
    options of a pass that is given by name. backend: a backend of torch.compile ("inductor",
    "aot_eager", or a function) that compiles the rewritten graphs, for passes whose nodes are the
    same in every step. compile: where kernels are compiled, under every pass and one by one: the
    regions that passes recompute, the loss in chunks, and work on whole weights. "auto" compiles
    them on accelerators, True also the regions and the loss on CPUs, False none.

    An error of any kind leaves the model as it was. Raises OptionError, TargetError, ModelError,
    ConflictError (all SurgeryError).
    """
    if not isinstance(model, nn.Module) and isinstance(spec, nn.Module):
        raise OptionError(
            "the model comes first: surgery.apply(model, "
            f"{model if isinstance(model, str) else '...'!r})."
        )
    if isinstance(spec, str) and spec == "auto":
        if "batch" not in options:
            raise OptionError(
                'surgery.apply(model, "auto") needs a batch, and memory= or device=: '
                'surgery.apply(model, "auto", batch=batch, memory="24GiB").'
            )
        known = [*inspect.signature(fit).parameters][1:]
        for name in options:
            if name not in known:
                raise OptionError(
                    f'surgery.apply(model, "auto") takes no {name}=.{near_misses(name, known)} It '
                    f"takes what surgery.fit does: {', '.join(known)}."
                )
        return fit(model, **options).apply(model, backend=backend, compile=compile)
    Surgery(decide(model, resolve(spec, options), backend, compile=compile)).install()
    return model


def remove(model: nn.Module) -> nn.Module:
    """Undo `apply`; the weights keep what they have learned. Returns the same model.

    Raises ModelError if nothing was applied.
    """
    surgery = applied(model)
    surgery.uninstall()
    return surgery.decision.model


def coordinates(model: nn.Module) -> list[Coordinates]:
    """Return every coordinate of the model with its map into a weight; see `Coordinates`.

    There is one entry for each weight, or one for each block if a weight is trained in blocks. If
    no pass chooses what is trained, every weight that requires gradients is its own coordinate.
    Raises ModelError if nothing was applied.
    """
    decision = applied(model).decision
    if decision.sites:
        return describe(decision.sites)
    return [
        Coordinates(weight=name, parameter=p, expand=lambda delta: delta, active=True)
        for name, p in decision.model.named_parameters()
        if p.requires_grad
    ]


def report(model: nn.Module, batch: dict[str, Any] | None = None) -> Report:
    """Say what was done and what it costs; with a batch, run it once and measure.

    batch: keyword arguments of the model's forward, with labels if the model computes its loss. The
    forward is run on it with gradients enabled, but no backward; no weight, gradient or state
    changes. The allocator measures the bytes. Raises ModelError if nothing was applied.
    """
    return measured.report(applied(model), batch)


def graphs(model: nn.Module) -> list[code.Graph]:
    """Return each graph captured so far, as readable code before and after the passes.

    Every node that a pass has inserted is marked with its name: `print(surgery.graphs(model)[0])`.
    The list is empty before the first training forward. Raises ModelError if nothing was applied.
    """
    return code.graphs(applied(model))


def step(model: nn.Module, optimizer: Any, run: Callable[[], Any] | None = None) -> None:
    """Step an optimizer that is not a `torch.optim.Optimizer`, so that the passes notice its step.

    optimizer: an object with `param_groups` and `state` like those of a torch optimizer. (For a
    torch optimizer, this is just `optimizer.step()`.) run: what makes the step instead of
    `optimizer.step()`. For LOMO (arXiv 2306.09782), which updates weights inside of backward, it is
    `lambda: optimizer.fused_backward(loss, lr)`. With `run`, a step that is not finite cannot be
    skipped. Raises ModelError if nothing was applied; OptimizerError if the optimizer lacks these
    attributes or coordinates, or if `run` is given and there are several processes.
    """
    backward = applied(model).backward
    if run is None and isinstance(optimizer, Optimizer):
        optimizer.step()
        return
    if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "state"):
        raise OptimizerError(
            f"{type(optimizer).__name__} has no param_groups and state, so the state of weights "
            "that are no longer trained could not be freed."
        )
    if run is not None and rank_of_world()[1] > 1:
        raise OptimizerError(
            f"{type(optimizer).__name__} would use up each gradient before it is averaged over the "
            "processes. Use an optimizer with a step()."
        )
    hearing.before_step(optimizer)
    if run is None:
        optimizer.step()
    else:
        with backward.taken_meanwhile():
            run()
    hearing.after_step(optimizer)
