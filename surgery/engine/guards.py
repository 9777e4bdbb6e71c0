"""Whether what surgery meets will do: wraps, layouts, forwards, optimizers. Each raises or not."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from surgery.compat import fsdp, hf
from surgery.contract.method import Method
from surgery.engine.callers import calls
from surgery.errors import CaptureError, ModelError, OptimizerError, SurgeryError, listed
from surgery.weights import shards
from surgery.weights.coordinate import Coordinate, unique
from surgery.weights.sites import Site


def around(what: str) -> SurgeryError:
    """Return the error for a forward that was not ours."""
    return SurgeryError(
        f"{what}: the forward went around surgery. Call the model itself, model(...), and not one "
        "of its parts. If something has put its own forward in place of the model's (TRL's "
        "SFTTrainer does), apply surgery after it: surgery.apply(trainer.model, ...)."
    )


_UNCAPTURED = (
    "TORCH_LOGS=graph_breaks names the line where Dynamo gave up; code under "
    "torch.compiler.disable is never captured"
)


def unreached(names: Sequence[str]) -> CaptureError:
    """Return the error for weights that a forward uses and the rewrite has not reached."""
    stacked = any("experts" in name for name in names)
    way = ' For stacked experts: model.set_experts_implementation("grouped_mm").' if stacked else ""
    return CaptureError(
        f"{len(names)} targeted weights were not reached by the rewrite in the first training "
        f"forward: {listed(names)}. Its output depends on them, so the part of the model that "
        f"reads them could not be captured ({_UNCAPTURED}): leave them out with targets=... "
        f"Nothing was trained; surgery.remove(model) restores the model.{way}"
    )


def uncaptured(model: nn.Module, passes: Sequence[Method]) -> CaptureError:
    """Return the error for a training forward of which no part was captured."""
    names = ", ".join(method.name for method in passes)
    return CaptureError(
        f"no part of the forward of {type(model).__name__} could be captured, so {names} had no "
        f"effect ({_UNCAPTURED}). Remove torch.compiler.disable or the graph break, or call "
        "surgery.remove(model)."
    )


def joined() -> ModelError:
    """Return the error for ranks that make other numbers of steps."""
    return ModelError(
        "under join() of DistributedDataParallel, ranks that have run out of batches make no more "
        "steps, so their rounds and draws would differ from those of the others. Give all ranks "
        "the same number of batches: DistributedSampler(..., drop_last=True)."
    )


def hooked(name: str) -> ModelError:
    """Return the error for a hook on a weight that would not hear of its gradient."""
    return ModelError(
        f"{name} has a hook on its gradient, but gets no gradient: another parameter is trained "
        "in its place. Put the hook on that parameter, which surgery.coordinates(model) lists, or "
        "leave the weight out of targets=."
    )


def unfrozen(names: Sequence[str], passes: Sequence[str]) -> ModelError:
    """Return the error for weights that were switched on and that no pass trains."""
    return ModelError(
        f"requires_grad of {listed(names)} was switched on after surgery.apply (or a tied weight "
        "was untied: load_state_dict(assign=True) does that, tie it again), and "
        f"{' and '.join(passes)} does not train it. Switch on only what is trained, "
        "for c in surgery.coordinates(model): model.get_parameter(c.weight).requires_grad_(True), "
        "and switch off the rest. To train more: surgery.remove(model), requires_grad_(True), then "
        "surgery.apply(model, ...) with targets= or always= that name it."
    )


def replaced(names: Sequence[str]) -> ModelError:
    """Return the error for modules that are others than those that surgery was applied to."""
    return ModelError(
        f"{listed(names)} was replaced after surgery.apply, by resize_token_embeddings, a new head "
        "or the like, and the passes would go on training the old module. Change the model first: "
        "surgery.remove(model), replace it, surgery.apply(model, ...), and build another optimizer."
    )


def warn_by_hand(times: int) -> None:
    """Warn of parameters that were written so often after a backward, before any step."""
    warnings.warn(
        f"trained parameters were changed after {times} backwards, but no optimizer has made a "
        "step: rounds never end, and changes through .data go unnoticed. Step with an optimizer of "
        "torch.optim, or a subclass of torch.optim.Optimizer; with any other, call "
        "surgery.step(model, optimizer).",
        stacklevel=2,
    )


def check_wrapping(coordinates: Iterable[Coordinate]) -> None:
    """Raise ModelError, in a training forward, if DistributedDataParallel is around us and waits
    for gradients of what is not being trained now."""
    wrapper = fsdp.ddp_around()
    if wrapper is None or wrapper.find_unused_parameters:
        return
    trained = {id(each.parameter) for each in coordinates if each.active}  # weights may share one
    if not all(id(each.parameter) in trained for each in coordinates):
        raise ModelError(
            "DistributedDataParallel waits for a gradient of every weight, and only some are "
            "trained in a round. Wrap it as "
            "DistributedDataParallel(model, find_unused_parameters=True); in the HF Trainer, "
            "ddp_find_unused_parameters=True."
        )


def check_layout(model: nn.Module) -> None:
    """Raise ModelError if FSDP1 or DeepSpeed has laid out the model's parameters anew."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ModelError(
            "this model is wrapped in FullyShardedDataParallel (FSDP1), which flattens parameters "
            "together. Use FSDP2: surgery.apply(model, ...), then "
            "torch.distributed.fsdp.fully_shard(model) (accelerate: fsdp_version: 2)."
        )
    for name, parameter in model.named_parameters():
        if fsdp.is_zero(parameter):
            raise ModelError(
                f"{name} belongs to DeepSpeed ZeRO, whose optimizer steps flat copies of many "
                "parameters at once, not coordinates. Use FSDP2, "
                "torch.distributed.fsdp.fully_shard (accelerate: fsdp_version: 2), or DDP."
            )


def check_membership(
    coordinates: Sequence[Coordinate], optimizer: Optimizer, held: Mapping[int, Tensor]
) -> None:
    """Raise OptimizerError if a coordinate is held by no optimizer."""
    missing = {id(p.parameter): p.name for p in coordinates if id(p.parameter) not in held}
    if not missing:
        return
    missing = _held_by_none(missing)
    if missing:
        raise OptimizerError(
            f"{type(optimizer).__name__} steps this model, but neither it nor another optimizer "
            f"holds {len(missing)} of the coordinates: "
            f"{listed(missing.values())}. It was probably built before surgery.apply, or from "
            "a part of the parameters (get_peft_model after surgery.apply switches "
            "requires_grad off). Build it afterwards, from all parameters: "
            "optimizer = torch.optim.AdamW(model.parameters(), lr=...)"
        )


def check_handed(handed: Iterable[Site], optimizer: Optimizer, held: Mapping[int, Tensor]) -> None:
    """Raise OptimizerError if an optimizer would step a weight whose gradient was handed on to
    coordinates that it does not hold: its loss is another model's."""
    for site in handed:
        if id(site.weight()) in held and not any(id(c.parameter) in held for c in site.coordinates):
            raise OptimizerError(
                f"{type(optimizer).__name__} holds {site.name} but none of its coordinates, which "
                "have received its gradient: another model shares the weight, without surgery. "
                "Apply surgery to a model that both are part of, or freeze the weight in the loss "
                "of the other. Nothing was stepped; call zero_grad() of both optimizers."
            )


def _held_by_none(missing: Mapping[int, str]) -> dict[int, str]:
    """Return those of some parameters, by id, that no optimizer holds: others may hold the rest."""
    # Only on the way to an error: this walks over all objects.
    others = [o for o in gc.get_objects() if issubclass(type(o), Optimizer)]
    held = {id(p) for other in others for group in other.param_groups for p in group["params"]}
    return {key: name for key, name in missing.items() if key not in held}


def check_held(
    present: Mapping[str, Tensor],
    optimizer: Optimizer,
    held: Mapping[int, Tensor],
    before: frozenset[str],
) -> None:
    """Raise OptimizerError if a parameter that an optimizer has stepped is another object now.

    present: what is there to step, by name. before: the names of what the optimizer has stepped.
    """
    gone = {id(p): name for name, p in present.items() if id(p) not in held and name in before}
    lost = list(_held_by_none(gone).values()) if gone else []
    if lost:
        raise OptimizerError(
            f"{type(optimizer).__name__} holds parameters that are not the model's any more, and "
            f"would leave {len(lost)} untrained: {listed(lost)}. They were replaced, by "
            "load_state_dict(assign=True) or by a .to() that makes new parameters. Load without "
            "assign=True, or build the optimizer again: "
            "optimizer = torch.optim.AdamW(model.parameters(), lr=...)"
        )


def check_resumed(optimizer: Optimizer) -> None:
    """Raise OptimizerError if a Trainer goes on with a run that the surgery does not know."""
    made = hf.steps_of_trainer(calls())
    if made:
        raise OptimizerError(
            f"the Trainer that calls {type(optimizer).__name__} has made {made} steps, but the "
            "surgery has made none: the run was resumed without the surgery's state. Give both "
            "runs the callback that saves and restores it: "
            "Trainer(..., callbacks=[surgery.TrainerCallback()])."
        )


def check_fresh(coordinates: Sequence[Coordinate], optimizer: Optimizer) -> None:
    """Raise OptimizerError if an optimizer has made steps before the surgery's first."""
    held = [(c, optimizer.state.get(c.parameter)) for c in unique(coordinates)]
    stepped = [c for c, state in held if state and ("step" not in state or int(state["step"]))]
    if not stepped:
        return
    made = optimizer.state[stepped[0].parameter].get("step")
    count = "steps" if made is None else f"{int(made)} steps"
    raise OptimizerError(
        f"{type(optimizer).__name__} has already made {count}, with state for "
        f"{stepped[0].name}, but the surgery has made none. If this run is resumed, restore the "
        "surgery's state too: surgery.load(model, folder, optimizer), or surgery.TrainerCallback() "
        "in a Trainer. If not, build the optimizer after surgery.apply."
    )


def only_makes_state(optimizer: Optimizer) -> bool:
    """Whether a step has rate zero and gradients of zeros: torch.distributed.checkpoint makes the
    state of an optimizer so, to load into."""
    if any(group.get("lr", 1.0) for group in optimizer.param_groups):
        return False
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    there = [shards.local(grad) for grad in grads if grad is not None]
    return bool(there) and not any(bool(grad.any()) for grad in there)
