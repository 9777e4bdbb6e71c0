"""What the laws are made of: the rows, one for each pass, and what a law looks at."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import processes
import pytest
import torch
from hypothesis import HealthCheck, settings
from models import FAMILIES as FAMILIES_OF_HF
from models import KINDS, Smooth, adapt, inputs_of, layers, loss_of, make
from torch import nn

import passes
from surgery.engine.finding import surgery_of
from surgery.testing import LAWS, Tiny
from surgery.testing.case import Case, Moved, adamw, anatomy, own, weights

__all__ = ["Moved", "adamw", "anatomy", "own", "weights"]

M = TypeVar("M")

OTHERS = ("llama", "gpt2")  # families besides the small model of `surgery.testing`

# name -> options for a round of `period` steps
SAMPLING = {
    "misa": lambda period=2, seed=0: passes.Misa(budget=0.2, period=period, seed=seed),
    "misa_span": lambda period=2, seed=0: passes.Misa(budget=0.2, span=1, period=period, seed=seed),
    "misa_flush": lambda period=2, seed=0: passes.Misa(
        budget=0.2, momentum_step=True, period=period, seed=seed
    ),
    "misa_always": lambda period=2, seed=0: passes.Misa(
        budget=0.15, always=".*norm.*|.*ln_.*", uniform_mix=0.2, period=period, seed=seed
    ),
    "lisa": lambda period=2, seed=0: passes.Lisa(layers=1, period=period, seed=seed),
    "lisa_outliers": lambda period=2, seed=0: passes.Lisa(
        layers=1, weights="outliers", threshold=1.9, period=period, seed=seed
    ),
    "badam": lambda period=2, seed=0: passes.BAdam(period=period, seed=seed),
}
# v random, or from the mean, which depends on how a batch is cut
PROJECTING = {
    "velora": lambda period=2, seed=0: passes.Velora(groups=4, init="random", seed=seed),
    "velora_redrawn": lambda period=2, seed=0: passes.Velora(groups=4, period=period, seed=seed),
    "rso": lambda period=2, seed=0: passes.Rso(rank=4, period=period, seed=seed),
    "galore": lambda period=2, seed=0: passes.Galore(
        rank=4, period=period, projection="random", seed=seed
    ),
    "galore_renewed": lambda period=2, seed=0: passes.Galore(
        rank=4, period=period, on_resample="project", always=".*norm.*|.*ln_.*", seed=seed
    ),
    "misa_of_rso": lambda period=2, seed=0: [
        # GPT-2's fused c_attn is drawn in parts, which have no coordinates of their own.
        passes.Misa(budget=0.4, targets=".*(up|down|proj|fc).*", period=period, seed=seed),
        passes.Rso(rank=4, period=3, seed=seed),
    ],
}
EXACT = {
    "recompute": lambda period=2, seed=0: passes.Recompute(),
    "chunked_loss": lambda period=2, seed=0: passes.ChunkedLoss(),
    "misa_and_both": lambda period=2, seed=0: [
        SAMPLING["misa"](period=period, seed=seed),
        passes.Recompute(),
        passes.ChunkedLoss(),
    ],
    "galore_and_both": lambda period=2, seed=0: [
        PROJECTING["galore"](period=period, seed=seed),
        passes.Recompute(),
        passes.ChunkedLoss(),
    ],
}
# right on average only
ROUNDED = {
    "compress": lambda period=2, seed=0: passes.Compress(seed=seed),
    "rso_and_all": lambda period=2, seed=0: [
        passes.Rso(
            rank=3,
            period=period,
            share="width",
            projection="orthonormal",
            on_resample="transport",
            always=".*norm.*|.*ln_.*",
            seed=seed,
        ),
        passes.Recompute(),
        passes.ChunkedLoss(),
        passes.Compress(seed=seed),
    ],
}
# gradients from two forwards
ZEROTH = {
    "mezo": lambda period=2, seed=0: passes.Mezo(eps=1e-4, seed=seed),
    "mezo_sign": lambda period=2, seed=0: passes.Mezo(eps=1e-4, update="sign", seed=seed),
    "mezo_conservative": lambda period=2, seed=0: passes.Mezo(
        eps=1e-4, update="conservative", seed=seed
    ),
    "mezo_hybrid": lambda period=2, seed=0: passes.Mezo(
        eps=1e-4, backward=r"(blocks\.[1-9]|model\.norm).*", seed=seed
    ),
    "mezo_and_misa": lambda period=2, seed=0: [
        passes.Mezo(eps=1e-4, targets=r"(model\.)?embed.*|blocks\.0.*", seed=seed),
        passes.Misa(
            budget=0.3, targets=r"blocks\.[1-9]\.(up|down)|.*mlp\.\w+", period=period, seed=seed
        ),
    ],
    "mezo_blocks": lambda period=2, seed=0: passes.Mezo(
        eps=1e-4, blocks=1, directions=2, seed=seed
    ),
    "sparse_mezo": lambda period=2, seed=0: passes.SparseMezo(
        keep_fraction=0.5, eps=1e-4, threshold="period", period=period, seed=seed
    ),
    "lozo": lambda period=2, seed=0: passes.Lozo(eps=1e-4, directions=2, period=period, seed=seed),
    "subzero": lambda period=2, seed=0: passes.SubZero(eps=1e-4, rank=4, period=period, seed=seed),
}
# on models with LoRA, which the laws put on all families
ADAPTED = {
    "flat_lora": lambda period=2, seed=0: passes.FlatLora(rho=1e-3, steps=4, seed=seed),
    "flat_lora_at_once": lambda period=2, seed=0: passes.FlatLora(rho=1e-3, seed=seed),
}
# on a vocabulary of 32 words, of which all are used: `tests/test_trim.py` has others
WORDS = {"trim": lambda period=2, seed=0: passes.Trim(used=range(32))}
# on models with a side path, which the laws put on, and on models of more blocks than usual
SIDE = {"sherl": lambda period=2, seed=0: passes.Sherl(seed=seed)}
# on models without one: `apply` puts it on
BARE = {"sherl_put_on": lambda period=2, seed=0: passes.Sherl(taps=3, seed=seed)}
# Every row goes through every law, except that only the first ones draw.
PASSES = SAMPLING | PROJECTING | EXACT | ROUNDED | ZEROTH
rows = pytest.mark.parametrize("row", PASSES)
# Every pass is in one of these: for what is about packages beside us, not about options of ours.
EACH_PASS = ["misa", "lisa", "badam", "velora", "galore", "rso_and_all"]
EACH_PASS += ["mezo", "sparse_mezo", "lozo", "subzero"]
each_pass = pytest.mark.parametrize("row", EACH_PASS)
sampling_rows = pytest.mark.parametrize("row", SAMPLING)
# Options of a pass change what it draws, not how it meets a model: one row of a kind meets others.
FAMILIES = [(row, family) for row in ("misa", "recompute", "chunked_loss") for family in OTHERS]
FAMILIES += [(row, family) for row in ("velora", "rso", "galore", "mezo") for family in OTHERS]
FAMILIES += [(row, "llama") for row in ("lisa", "compress", "rso_and_all", "lozo")]
FAMILIES += [(row, "gpt2") for row in ("badam", "misa_and_both", "subzero")]
FAMILIES += [(row, family) for row in ("flat_lora_at_once", "sherl") for family in OTHERS]
# What one run shows: the laws that share it stand together, and so does all that is of one row.
OF_A_RUN = [law for law in LAWS if int(law.split()[0]) in (1, 2, 4, 5, 6, 7, 8, 10, 15)]
OF_A_RUN += [law for law in LAWS if law.startswith("11 loss scaling")]
AGAIN = [law for law in OF_A_RUN if law.startswith(("10 draws", "11 "))]  # they run it once more
# Its v, or P, comes from the first backward of a step, which depends on how a batch is cut.
EXCEPT = {
    (row, law)
    for row in ("velora_redrawn", "galore_renewed")
    for law in LAWS
    if law.startswith("11 accumulation")
}
# A step that would raise the loss is not made.
EXCEPT |= {("mezo_conservative", law) for law in LAWS if law.startswith("6 ")}
# What `apply` puts on has no like in the plain model (15; test_sherl.py has the dense one), wants a
# frozen model (16), and begins where all but its last projection has no gradient (6).
EXCEPT |= {(row, law) for row in BARE for law in LAWS if law.split()[0] in ("6", "15", "16")}
LAW_CASES = [
    (row, family, law)
    for row in PASSES | ADAPTED | WORDS | SIDE | BARE
    for family in ("smooth", "plain", *OTHERS)
    for law in LAWS
    if (row, law) not in EXCEPT
    if family != "smooth" or law in OF_A_RUN
    if family != "plain" or law not in OF_A_RUN
    if family not in OTHERS or ((row, family) in FAMILIES and law in OF_A_RUN and law not in AGAIN)
]
# Few examples, since most capture a model; the fixture only resets Dynamo between tests.
laws = settings(
    max_examples=4,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@lru_cache(maxsize=2)
def case(row: str, family: str = "plain") -> Case:
    """Return a row on a family, as `surgery.testing` takes it; it keeps the run of its laws."""
    average = row in ROUNDED or row in ZEROTH or row in ADAPTED
    options = {} if row in SIDE | BARE else layers(family, 2)
    kind = adapted if row in ADAPTED else sided if row in SIDE else deep if row in BARE else make
    # What is sampled has the gradients of eager to the bit, exact rewrites up to the order of sums.
    gradient = 1e-12 if row in SAMPLING else 0.02 if average else 1e-6
    return Case(
        spec=(PASSES | ADAPTED | WORDS | SIDE | BARE)[row](),
        model=partial(kind, family, **options),
        inputs=partial(inputs_by_name, family),
        forward=1e-3 if row in ZEROTH or row in ADAPTED else 0.0,
        gradient=gradient,
        average=average,
        rate=1e-3 if row in ZEROTH else 0.1,  # a step goes along all coordinates at once
    )


def adapted(family: str, **options: int) -> nn.Module:
    """Return a model with LoRA."""
    kind = f"lora on {family}"
    kind = kind if kind in KINDS else "lora on plain" if family == "smooth" else "lora"
    return adapt(make(family, **options), kind)


def deep(family: str, blocks: int = 6) -> nn.Module:
    """Return a model of so many blocks."""
    if family in FAMILIES_OF_HF:
        return make(family, **layers(family, blocks))
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return (Smooth if family == "smooth" else Tiny)(depth=blocks).train()


def sided(family: str, blocks: int = 6) -> nn.Module:
    """Return one with a side path that changes its outputs."""
    model = deep(family, blocks)
    side = passes.Sherl().start(model).side
    side.put_on(model)
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(1)
        side.up.weight.normal_(std=0.1)
    return model


def inputs_by_name(family: str, **options: int) -> dict[str, torch.Tensor]:
    found = inputs_of(family, **options)
    return found | {"targets": found["tokens"]} if "tokens" in found else found


def state_of(model: nn.Module):
    state = surgery_of(model)
    assert state is not None
    return state


def method_of(model: nn.Module, kind: type[M]) -> M:
    """Return the run-time state of the model's pass of one kind."""
    return next(method for method in state_of(model).decision.methods if isinstance(method, kind))


def optimizer_of(kind: str, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def train(model: nn.Module, family: str, steps: int, optimizer=None) -> torch.optim.Optimizer:
    optimizer = optimizer or adamw(model)
    for seed in range(steps):
        loss_of(model, inputs_of(family, seed=seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def run_two_ranks(script: str, folder: Path) -> None:
    """Run a script in two processes, given its rank and a store; each must print "equal"."""
    ranks = [[str(rank), str(folder / "store")] for rank in range(2)]
    assert [out.strip() for out in processes.run(script, folder, *ranks)] == ["equal"] * 2
