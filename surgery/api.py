"""The verbs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from surgery import clock, memory
from surgery.capture import Dispatch
from surgery.compilers import Backend, check_backend
from surgery.coordinates import TABLE, Coordinates, CoordinateTable, Piece, Site, describe
from surgery.distributed import check_layout, rank_of_world
from surgery.errors import ConflictError, ModelError, OptimizerError, SurgeryError
from surgery.registry import resolve
from surgery.state import Surgery, applied, surgery_of


def apply(
    model: nn.Module, spec: Any, *, backend: Backend | None = None, **options: Any
) -> nn.Module:
    """Rewrite a model in place, so that it trains by the given passes in any plain loop.

    model: a PyTorch or Hugging Face model with its weights loaded. spec: the name of a pass, an
    instance from `passes`, or a list of these, applied in order. options: of a pass given by name.
    backend: of torch.compile ("inductor", "aot_eager", or a function), which compiles the rewritten
    graphs; for passes whose nodes are the same in every step. Build the optimizer afterwards.
    Returns the same model.

    All or nothing. Raises OptionError, TargetError, ModelError, ConflictError (all SurgeryError);
    the model is then unchanged.
    """
    chosen = resolve(spec, options)
    _check_model(model)
    _check_twice(chosen)
    methods = tuple(options.start(model) for options in chosen)
    _check_alone(methods)
    check_backend(methods, backend)
    sites = _sites(model, methods)
    surgery = Surgery(
        model=model,
        passes=chosen,
        methods=methods,
        backend=backend,
        sites=sites,
        required_grad=[
            (owner, key, p.requires_grad)
            for owner in model.modules()
            for key, p in owner.named_parameters(recurse=False)
        ],
    )
    blocks = [piece for site in sites if not site.whole for piece in site.pieces]
    if sites:
        whole = {site.name for site in sites if site.whole}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in whole)
    if blocks:
        model.add_module(TABLE, CoordinateTable(blocks))
    surgery.dispatch = Dispatch(model, surgery)
    surgery.dispatch.install()
    try:
        surgery.bind()
    except SurgeryError:
        remove(model)
        raise
    return model


def remove(model: nn.Module) -> nn.Module:
    """Take everything out again; the weights keep what they have learned. Returns the same model.

    Raises ModelError if nothing was applied.
    """
    surgery = applied(model)
    model = surgery.model
    surgery.release()
    surgery.dispatch.uninstall()
    model._modules.pop(TABLE, None)
    for parameter, required in surgery.flags():
        parameter.requires_grad_(required)
    return model


def coordinates(model: nn.Module) -> list[Coordinates]:
    """Return every coordinate of the model with its map into a weight; see `Coordinates`.

    One entry for each weight, or for each block of a weight that is trained in blocks. If no pass
    says what is trained, every weight that requires gradients is its own coordinate. Raises
    ModelError if nothing was applied.
    """
    surgery = applied(model)
    if surgery.sites:
        return describe(surgery.sites)
    return [
        Coordinates(weight=name, parameter=p, expand=lambda delta: delta, active=True)
        for name, p in surgery.model.named_parameters()
        if p.requires_grad
    ]


def report(model: nn.Module, batch: dict[str, Any] | None = None) -> memory.Report:
    """Say what was done and what it costs; with a batch, run it once and measure.

    batch: keyword arguments of the model's forward, with labels if the model computes its loss. It
    is run forward with gradients, not backward; no weight, gradient or state changes. The bytes are
    the allocator's. Raises ModelError if nothing was applied.
    """
    surgery = applied(model)
    return memory.report(surgery, batch)


def step(model: nn.Module, optimizer: Any, run: Callable[[], Any] | None = None) -> None:
    """Step an optimizer that the clock does not hear by itself.

    optimizer: not a `torch.optim.Optimizer`, but with `param_groups` and `state` like one. (For a
    torch optimizer this is `optimizer.step()`.) run: what makes the step instead of
    `optimizer.step()`: of LOMO (arXiv 2306.09782), which updates weights inside of backward,
    `lambda: optimizer.fused_backward(loss, lr)`. It cannot take back a step that is not finite.
    Raises ModelError if nothing was applied, OptimizerError if the optimizer has no such attributes
    or lacks coordinates, or if `run` is given and there are several processes.
    """
    owner = applied(model)
    if run is None and isinstance(optimizer, Optimizer):
        optimizer.step()
        return
    if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "state"):
        raise OptimizerError(
            f"{type(optimizer).__name__} has no param_groups and state, so the state of weights "
            "that leave could not be freed."
        )
    if run is not None and rank_of_world()[1] > 1:
        raise OptimizerError(
            f"{type(optimizer).__name__} would use up each gradient before it is averaged over the "
            "processes. Use an optimizer with a step()."
        )
    clock.before_step(optimizer)
    owner.fused = run is not None
    try:
        (run or optimizer.step)()
    finally:
        owner.fused = False
    clock.after_step(optimizer)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"surgery.apply takes an nn.Module, not a {type(model).__name__}.")
    present = surgery_of(model)
    if present is not None:
        names = ", ".join(options.name for options in present.passes)
        raise ModelError(
            f"surgery was applied to this {type(model).__name__} already ({names}). Give all "
            "passes in one list, or call surgery.remove(model) first."
        )
    if isinstance(model, DistributedDataParallel | DataParallel):
        raise ModelError(
            f"this model is wrapped in {type(model).__name__} already, which has laid out its "
            "gradients. Apply first, wrap afterwards: surgery.apply(model, ...), then "
            f"{type(model).__name__}(model)."
        )
    check_layout(model)
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ModelError(f"this {type(model).__name__} has no parameters: nothing to train.")
    meta = [name for name, parameter in parameters.items() if parameter.is_meta]
    if meta:
        raise ModelError(
            f"{len(meta)} parameters are on the meta device, {meta[0]} first: load the weights "
            "before surgery.apply. To see what a pass would do, use surgery.plan(model, ...)."
        )


def _check_twice(chosen: tuple[Any, ...]) -> None:
    for options in chosen:
        if chosen.count(options) > 1:
            raise ConflictError(f"{options.name} is given twice: {options!r}. Leave one out.")


def _check_alone(methods: tuple[Any, ...]) -> None:
    for method in methods:
        if method.alone and len(methods) > 1:
            other = next(each for each in methods if each is not method)
            raise ConflictError(
                f"{method.name} trains by forwards alone: nothing is kept for backward, and no "
                f"gradient reaches a weight, so {other.name} has nothing to work on. Leave it out."
            )


def _sites(model: nn.Module, methods: tuple[Any, ...]) -> tuple[Site, ...]:
    # Passes that sample draw from what passes that map have made of the same weights.
    for method in methods:
        for piece in [p for p in method.pieces if p.map is not None]:
            for other in methods:
                if other is not method and other.adopt(piece):
                    break
    claims: dict[str, tuple[Any, list[Piece]]] = {}
    for method in methods:
        for piece in method.pieces:
            holder, pieces = claims.setdefault(piece.weight, (method, []))
            if piece in pieces:
                continue
            if holder is not method:
                parts = any(p.index is not None for p in [piece, *pieces])
                way = ", a larger budget draws it as a whole" if parts else ""
                raise ConflictError(
                    f"{holder.name} and {method.name} both train {piece.name}. Give each its own "
                    f"weights with targets=..., or leave one of them out{way}."
                )
            pieces.append(piece)
    order = [name for name, _ in model.named_parameters() if name in claims]
    return tuple(
        Site(
            name=name,
            owner=model.get_submodule(name.rpartition(".")[0]),
            pieces=tuple(claims[name][1]),
        )
        for name in order
    )
