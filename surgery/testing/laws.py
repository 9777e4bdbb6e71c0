"""The laws: true for every pass, each a function of a `Case`; its docstring says what holds."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.api import apply, coordinates, remove, report
from surgery.checkpoints.run import load, save
from surgery.engine.finding import applied
from surgery.errors import ConflictError, ModelError, SurgeryError
from surgery.memory import device_of, measure, state_bytes, storage_bytes
from surgery.reports.predicted import plan
from surgery.testing.case import (
    Case,
    LawError,
    adamw,
    anatomy,
    close,
    demand,
    equal,
    own,
    weights,
)
from surgery.testing.watched import watch, watched
from surgery.weights.additions import named

Law = Callable[[Case], None]


def law_1_the_model_keeps_its_identity(case: Case) -> None:
    """apply keeps the object, its class, and names, shapes and identities of its parameters."""
    model = case.model()
    before = anatomy(model)
    demand(apply(model, case.passes()) is model, "apply returns another object")
    after = anatomy(model)
    beside = named(applied(model).decision.additions)
    after["keys"] = [key for key in after["keys"] if key not in beside]
    for what in ("class", "keys", "buffers"):
        demand(after[what] == before[what], f"apply changes the {what}")
    for name, kept in before["parameters"].items():
        now = after["parameters"].get(name)
        demand(now is not None and now[:3] == kept[:3], f"apply replaces {name}")


def law_2_the_first_forward_is_the_plain_one(case: Case) -> None:
    """The first forward after apply gives what the plain model gives."""
    expected, found = watched(case).losses
    if case.forward:
        close(found, expected, "the first loss", rtol=case.forward, atol=0.1 * case.forward)
    else:
        equal(found, expected, "the first loss")


def law_3_apply_is_all_or_nothing(case: Case) -> None:
    """An error leaves the model as it was; the same pass twice, and applying twice, are errors."""
    model = case.model()
    before = anatomy(model)
    own_passes = case.passes()
    for bad, error in (
        ([*own_passes, own_passes[-1]], ConflictError),
        ([*own_passes, "no such pass"], SurgeryError),
    ):
        _refuses(lambda bad=bad: apply(model, bad), error, "a bad list of passes")
        demand(anatomy(model) == before, "an error in apply leaves a trace")
    apply(model, own_passes)
    now = anatomy(model)
    _refuses(lambda: apply(model, own_passes), ModelError, "applying twice")
    demand(anatomy(model) == now, "the refusal of a second apply leaves a trace")


def law_4_remove_undoes_apply(case: Case) -> None:
    """remove(apply(m)) is m: classes, keys, identities, requires_grad, hooks, outputs."""
    model, plain = case.model(), case.model()
    *_, frozen = own(model)
    for each in (model, plain):
        each.get_parameter(frozen).requires_grad_(False)
    before, expected = anatomy(model), weights(model)
    apply(model, case.passes())
    demand(remove(model) is model and anatomy(model) == before, "remove leaves a trace")
    for name, parameter in own(model).items():
        equal(parameter.detach(), expected[name], name)
    for each in (model, plain):
        torch.manual_seed(3)
        case.loss(each).backward()
    for name, parameter in own(plain).items():
        there = own(model)[name].grad is not None
        demand(there == (parameter.grad is not None), f"no gradient reaches {name} after remove")
    run = watched(case)  # and after training
    demand(run.anatomy[0] == run.anatomy[1], "remove leaves a trace of a run")
    for name, value in run.last[1].items():
        equal(value, run.last[0][name], f"{name} before remove and after it")
    demand(run.reached[0] == run.reached[1], "not every gradient flows after a run and remove")


def law_5_weights_are_current_after_every_step(case: Case) -> None:
    """After every step, the model's own weights are start + map(coordinates)."""
    for number, step in enumerate(watched(case).steps):
        for name, value in step.weights.items():
            what = f"{name} at step {number}"
            close(value, step.expected[name], what, rtol=2e-5, atol=2e-6)


def law_6_what_is_not_trained_stays(
    case: Case, seed: int | None = None, period: int = 2, steps: int = 5
) -> None:
    """A weight that is not being trained is bit-identical before and after; others move."""
    run = watched(case) if seed is None else watch(case, seed=seed, period=period, steps=steps)
    before = run.start
    for number, step in enumerate(run.steps):
        for name, value in step.weights.items():
            moves = name in step.trained
            same = torch.equal(value, before[name])
            demand(same != moves, f"{name} {'stays' if moves else 'moves'} in step {number}")
        before = step.weights


def law_7_state_exists_for_live_coordinates_only(
    case: Case,
    make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    rounds: int | None = None,
) -> None:
    """Optimizer state and gradients exist for live coordinates only, over many resamples."""
    run = watched(case) if rounds is None else watch(case, make=make, period=1, steps=rounds)
    for step in run.steps:
        demand(not step.stray, "optimizer state of what left is not freed: run.forget")
        demand(not step.left, f"{step.left} hold gradients after zero_grad")
        demand(step.held <= len(step.weights), "optimizer state has grown")


def law_8_one_capture(case: Case) -> None:
    """One capture for each input structure, however often the pass resamples."""
    run = watched(case)
    first, now = run.captures
    demand(now == first, f"{now - first} captures more in {len(run.steps)} steps of one structure")


def law_9_a_resumed_run_goes_on(case: Case, saved: int = 3, steps: int = 20) -> None:
    """save in the middle of a period, load elsewhere: the next steps are those that were made."""
    torch.manual_seed(0)
    model = case.applied(period=2)
    optimizer = case.train(model, saved)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        save(model, folder, optimizer)
        state = torch.get_rng_state()
        case.train(model, steps, optimizer)
        other = case.applied(period=2)
        with torch.no_grad():
            for parameter in own(other).values():
                parameter.add_(0.1)  # weights of its own
        resumed = adamw(other)
        load(other, folder, resumed)
    torch.set_rng_state(state)
    case.train(other, steps, resumed)
    for name, parameter in own(model).items():
        equal(own(other)[name].detach(), parameter.detach(), f"{name} of the resumed run")


def law_10_the_global_generators_are_not_touched(case: Case) -> None:
    """Draws come from the library's own generator: torch's and Python's stay where they are."""
    for plain, ours in zip(*watched(case).drawn, strict=False):
        demand(ours[0] == plain[0], "torch's generator is touched")
        demand(ours[1] == plain[1], "Python's generator is touched")


def law_10_draws_depend_on_the_seed(case: Case, steps: int = 3) -> None:
    """The same seed gives the same run, whatever else is drawn; weights do not differ by a bit."""
    again = watch(case, noise=1, steps=steps).steps[-1]
    for name, value in watched(case).steps[steps - 1].weights.items():
        equal(again.weights[name], value, f"{name} of a second run")


def law_11_accumulation_is_one_large_batch(
    case: Case, parts: int = 2, norm: float = 0.05, period: int = 2
) -> None:
    """k micro-batches, accumulated and clipped, equal one large batch."""
    whole, cut = case.applied(period=period), case.applied(period=period)
    for model, micro in ((whole, 1), (cut, parts)):
        optimizer: torch.optim.Optimizer
        optimizer = torch.optim.SGD(model.parameters(), lr=case.rate, momentum=0.5)
        if any(getattr(m, "ending", None) for m in applied(model).decision.methods):
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-3)
        for seed in range(6):
            batch = {k: v.chunk(micro) for k, v in case.inputs(seed=seed, rows=4).items()}
            for i in range(micro):
                (model_loss(model, {k: v[i] for k, v in batch.items()}) / micro).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
            optimizer.step()
            optimizer.zero_grad()
    rtol, atol = (0.05, 5e-3) if case.average else (1e-4, 1e-6)
    for name, parameter in own(whole).items():
        close(own(cut)[name].detach(), parameter.detach(), name, rtol, atol)


def law_11_loss_scaling_changes_nothing(case: Case, scale: float = 1024.0, steps: int = 8) -> None:
    """A GradScaler with clipping gives the run without one."""
    scaled = watch(case, scale=scale, steps=steps).steps[-1]
    for name, value in watched(case).steps[steps - 1].weights.items():
        close(scaled.weights[name], value, name, rtol=1e-5, atol=1e-7)


def law_11_autocast_and_checkpointing(case: Case) -> None:
    """A forward under autocast trains; a checkpointed one gives the gradients of the plain one."""
    model = case.applied()
    with torch.autocast("cpu", torch.bfloat16):
        loss = case.loss(model)
    loss.backward()
    there = [c for c in coordinates(model) if c.parameter.grad is not None]
    demand(there, "no gradient reaches a coordinate under autocast")
    demand(
        all(bool(c.parameter.grad.isfinite().all()) for c in there if c.parameter.grad is not None),
        "gradients under autocast are not finite",
    )


def law_13_the_report_is_the_allocators(case: Case) -> None:
    """What report says in bytes is what the allocator says."""
    model = case.applied()
    inputs = case.inputs(seed=1, rows=2)
    model_loss(model, inputs).backward()  # draws what is drawn once, and keeps it
    model.zero_grad()
    found = report(model, inputs).after
    now = measure(lambda: model_loss(model, inputs), device_of(model)).live
    demand(found.activations == now, f"activations: {found.activations}, measured {now}")
    held = storage_bytes(model.parameters())
    demand(found.parameters == held, f"parameters: {found.parameters}, measured {held}")
    optimizer = adamw(model)
    model_loss(model, inputs).backward()
    grads = storage_bytes(p.grad for p in model.parameters() if p.grad is not None)
    demand(found.gradients == grads, f"gradients: {found.gradients}, measured {grads}")
    optimizer.step()
    state, said = state_bytes(optimizer), report(model).after.optimizer
    demand(state == said or not state, f"optimizer state: {said}, measured {state}")


def law_14_copies_work(case: Case) -> None:
    """deepcopy and pickle give models that train on by themselves, as the original does."""
    model = case.applied(period=2)
    case.train(model, 2)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    before = weights(model)
    runs = []
    for each in (*copies, model):
        case.train(each, 3)
        runs.append(weights(each))
        if each is not model:
            for name, value in weights(model).items():
                equal(value, before[name], f"{name}, after a copy was trained")
    for name, value in runs[-1].items():
        for run in runs[:-1]:
            equal(run[name], value, f"{name} of a copy that was trained on")


def law_15_gradients_are_adjoint(case: Case) -> None:
    """For each coordinate and a random e: <dense dW, expand(e)> = <coordinate.grad, e>."""
    run = watched(case)
    found = run.adjoint
    demand(not found.untrained, f"{found.untrained} have gradients and are not trained")
    demand(found.off, "nothing is being trained")
    for name, off in found.off.items():
        demand(off < float("inf"), f"no gradient reaches the coordinate of {name}")
        demand(off <= case.gradient, f"the gradient of {name} is off by {off:.2g}")
    demand(not found.unlisted, f"coordinates of {found.unlisted} are not in model.parameters()")
    demand(run.keys[0] == run.keys[1], "state_dict has other keys")


def law_16_preconditions_come_first(case: Case) -> None:
    """A pass with nothing to train says so before anything changes, with the fix."""
    model = case.model()
    trains = bool(case.decision().sites)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = anatomy(model)
    if trains:
        said = _refuses(lambda: apply(model, case.passes()), SurgeryError, "a frozen model")
        demand("requires_grad" in said, f"the refusal does not say what to do: {said}")
    else:
        remove(apply(model, case.passes()))
    demand(anatomy(model) == before, "a refusal leaves a trace")


def law_17_a_plan_is_what_apply_does(case: Case) -> None:
    """plan gives the numbers of report after apply, and refuses in the words of apply."""
    model = case.model()
    before = anatomy(model)
    said = plan(model, None, case.passes())
    demand(anatomy(model) == before, "plan leaves a trace")
    with torch.device("meta"):
        meta = plan(case.model(), None, case.passes())
    apply(model, case.passes())
    done = report(model)
    for what in ("parameters", "gradients", "optimizer"):
        for side in ("before", "after"):
            numbers = [getattr(getattr(each, side), what) for each in (said, meta, done)]
            demand(len(set(numbers)) == 1, f"{what} {side}: planned {numbers[:2]}, {numbers[2]}")
    own_passes = case.passes()
    for bad in ([*own_passes, own_passes[-1]], [*own_passes, "no such pass"]):
        words = [
            _refuses(lambda b=bad: plan(case.model(), None, b), SurgeryError, "plan"),
            _refuses(lambda b=bad: apply(case.model(), b), SurgeryError, "apply"),
        ]
        demand(words[0] == words[1], f"plan says {words[0]!r}, apply {words[1]!r}")


class _Broken(Exception):
    """Something of the model's own that fails, of a class that nobody expects."""


def law_18_whatever_error_changes_nothing(case: Case) -> None:
    """Whatever error apply ends with, of any class, the model is as before."""

    def fails(*_: Any, **__: Any) -> Any:
        raise _Broken

    for what in ("get_input_embeddings", "add_module", "named_modules"):
        model = case.model()
        kind = type(model)
        before = anatomy(model)
        model.__class__ = type(kind.__name__, (kind,), {what: fails})
        try:
            apply(model, case.passes())
        except _Broken:
            model.__class__ = kind
        else:
            model.__class__ = kind  # it had no use for that
            remove(model)
        demand(anatomy(model) == before, f"an error of {what} leaves a trace")


def model_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Run a model on a batch."""
    from surgery.memory import loss_of

    return loss_of(model(**inputs))


def _refuses(call: Callable[[], Any], error: type[Exception], what: str) -> str:
    try:
        call()
    except error as found:
        return str(found)
    raise LawError(f"{what} is not refused")


LAWS: dict[str, Law] = {
    name.removeprefix("law_").replace("_", " "): law
    for name, law in list(globals().items())
    if name.startswith("law_")
}
