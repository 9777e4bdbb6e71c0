"""plan is apply that changes nothing: it takes what apply takes, and refuses in its words."""

from __future__ import annotations

import pytest
import torch
from laws import PASSES, state_of
from models import inputs_of, loss_of, make
from torch import nn

import passes
import surgery

REFUSED = {
    "two samplers": lambda: [passes.Misa(budget=0.5), passes.BAdam()],
    "a sampler beside forwards": lambda: [passes.Mezo(), passes.BAdam()],
    "forwards, then an exact pass": lambda: [passes.Mezo(), passes.Recompute()],
    "an exact pass, then forwards": lambda: [passes.Recompute(), passes.Mezo()],
    "twice": lambda: [passes.Recompute(), passes.Recompute()],
    "momentum step over mapped ones": lambda: [
        passes.Misa(budget=0.5, momentum_step=True),
        passes.Rso(rank=4),
    ],
    "no such target": lambda: passes.Misa(targets=["nowhere"]),
    "a bad pattern": lambda: passes.Misa(targets="*.weight"),
    "no such pass": lambda: "miza",
    "an option of many": lambda: ["misa", "lisa"],
    "projections that clash": lambda: [passes.Rso(rank=4), passes.Velora(groups=4)],
}


def said_by(call, *args, **options) -> str:
    with pytest.raises(surgery.SurgeryError) as error:
        call(*args, **options)
    return f"{type(error.value).__name__}: {error.value}"


@pytest.mark.parametrize("row", REFUSED)
def test_plan_refuses_what_apply_refuses_with_the_same_words(row):
    options = {"budget": 0.5} if row == "an option of many" else {}
    planned = said_by(surgery.plan, make("plain"), None, REFUSED[row](), **options)
    applied = said_by(surgery.apply, make("plain"), REFUSED[row](), **options)
    assert planned == applied


def made_for_inference() -> nn.Module:
    with torch.inference_mode():
        return make("plain")


def taken(model: nn.Module) -> nn.Module:
    model.add_module("surgery_coordinates", nn.Linear(2, 2))
    return model


def wrapped(model: nn.Module) -> nn.Module:
    return nn.DataParallel(model)


@pytest.mark.parametrize(
    "spoil",
    [
        wrapped,
        lambda model: surgery.apply(model, "recompute"),
        lambda model: nn.Identity(),
        lambda model: 3,
        lambda model: torch.compile(model),
        lambda model: made_for_inference(),
        lambda model: torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)),
        taken,
    ],
    ids=["wrapped", "applied already", "no parameters", "no module"]
    + ["compiled", "inference", "scripted", "a child of the table's name"],
)
def test_plan_refuses_the_models_that_apply_refuses(spoil):
    model = spoil(make("plain"))
    before = list(model.modules()) if isinstance(model, nn.Module) else []
    planned = said_by(surgery.plan, model, None, "misa", budget=0.5)
    assert planned == said_by(surgery.apply, model, "misa", budget=0.5)
    assert not before or list(model.modules()) == before


def test_a_backend_that_apply_refuses():
    options = {"budget": 0.5, "backend": "inductor"}
    planned = said_by(surgery.plan, make("plain"), None, "misa", **options)
    assert planned == said_by(surgery.apply, make("plain"), "misa", **options)


MORE = {
    "misa over rso": lambda: [passes.Misa(budget=0.4, targets=".*(up|down).*"), passes.Rso(rank=4)],
    "rso under misa": lambda: [
        passes.Rso(rank=4),
        passes.Misa(budget=0.4, targets=".*(up|down).*"),
    ],
    "misa over velora": lambda: [
        passes.Misa(budget=0.6, targets=".*(up|down).*"),
        passes.Velora(groups=4),
    ],
    "rso, embeddings always": lambda: passes.Rso(rank=4, always=["embed"]),
    "mezo, four directions": lambda: passes.Mezo(directions=4),
    "mezo, dense": lambda: passes.Mezo(dense=True),
}


def frozen_in_part(dtype: torch.dtype) -> nn.Module:
    model = make("plain").to(dtype=dtype)
    model.head.weight = model.embed.weight  # tied, on the meta device too
    model.blocks[0].norm.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", [*PASSES, *MORE])
def test_plans_numbers_are_those_of_report_after_apply(row, dtype):
    spec = (PASSES | MORE)[row]
    model = frozen_in_part(dtype)
    planned = [surgery.plan(model, None, spec())]
    with torch.device("meta"):
        planned.append(surgery.plan(frozen_in_part(dtype), None, spec()))
    found = surgery.report(surgery.apply(model, spec()))
    for each in planned:
        for side in ("before", "after"):
            mine, theirs = vars(getattr(each, side)), vars(getattr(found, side))
            assert mine == theirs, (row, side)


def test_a_plan_of_misa_over_rso_counts_what_is_drawn():
    """9,216 bytes of gradients once stood in the plan of a run that has 512."""
    model = make("plain")
    spec = [passes.Misa(budget=0.4, targets=".*up.weight"), passes.Rso(rank=4, targets=["up"])]
    found = surgery.plan(model, None, spec)
    applied = surgery.apply(make("plain"), spec)
    active = {id(c.parameter): c.parameter for c in surgery.coordinates(applied) if c.active}
    assert found.after.gradients == sum(4 * p.numel() for p in active.values())


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(x))).sum()


@pytest.mark.parametrize("spec", ["recompute", "badam"])
def test_a_forward_that_holds_its_model_is_planned_on_a_copy(spec):
    """`deepcopy` leaves a function as it is: the copy's forward would run the model itself."""
    model, plain = Small(), Small()
    own = model.forward
    model.__dict__["forward"] = lambda x: own(x)
    batch = {"x": torch.ones(2, 4)}
    found = surgery.plan(model, batch, spec)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found.after.peak == surgery.plan(plain, batch, spec).after.peak


def test_a_compiled_part_is_planned_as_it_is_before():
    """Its machine code would read memory that is not there."""
    model, plain = Small(), Small()
    model.up = torch.compile(model.up)  # pyright: ignore[reportAttributeAccessIssue]
    batch = {"x": torch.ones(2, 4)}
    found = surgery.plan(model, batch, "recompute")
    assert found.before.peak == surgery.plan(plain, batch, "recompute").before.peak


@pytest.mark.parametrize("row", ["recompute", "compress", "chunked_loss"])
def test_what_an_exact_pass_would_do_in_graphs_is_what_it_does(row):
    model, batch = make("llama"), inputs_of("llama", rows=4, length=32)
    planned = dict(surgery.plan(model, batch, row).lines)
    unplayed = dict(surgery.plan(model, None, row).lines)
    loss_of(surgery.apply(model, row), batch)
    (method,) = state_of(model).decision.methods
    said = dict(method.lines())
    assert said and said.items() <= planned.items()
    assert not said.keys() & unplayed.keys()  # nothing was captured: no count to speak of
