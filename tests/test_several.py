"""Several optimizers under one GradScaler, and sparse gradients: as on a plain model."""

from __future__ import annotations

import copy

import pytest
import torch
from laws import own, state_of, weights
from torch import nn

import passes
import surgery


class Bags(nn.Module):
    """An embedding with sparse gradients, and Linears; no tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16, sparse=True)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)) for _ in range(3)
        )
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens).mean(1)
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x), targets)


def bags(sparse: bool) -> nn.Module:
    torch.manual_seed(0)
    model = Bags()
    model.embed.sparse = sparse
    return model.train()


def batch(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 40, (4, 6), generator=generator)
    return {"tokens": tokens, "targets": torch.randint(0, 5, (4,), generator=generator)}


SPECS = {
    "exact": lambda: [passes.Recompute(), passes.ChunkedLoss()],
    "misa": lambda: passes.Misa(budget=1.0, always=["embed", "head"]),
    "lisa": lambda: passes.Lisa(layers=3),
    "badam": lambda: passes.BAdam(period=2, order="ascending"),
    "rso": lambda: passes.Rso(rank=4, period=3, always=["embed"]),
}


def optimizers(model: nn.Module, sparse: bool) -> list[torch.optim.Optimizer]:
    """Return one for the embedding, and one for the rest."""
    known = [p for p in model.parameters() if p.requires_grad]
    tables = [p for p in known if p is model.embed.weight]
    others = [p for p in known if p is not model.embed.weight]
    kind = torch.optim.SparseAdam if sparse else torch.optim.Adam
    if not tables:  # two for the rest
        tables, others, kind = others[::2], others[1::2], torch.optim.Adam
    return [kind(tables, lr=1e-2), torch.optim.AdamW(others, lr=1e-3)]


def clip(optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, torch.optim.SparseAdam):  # torch has no norm for it
        held = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(held, 5.0)


@pytest.mark.parametrize("row", SPECS)
@pytest.mark.parametrize("sparse", [False, True])
def test_several_optimizers_with_one_scaler(row, sparse):
    """Also over a step that is not finite: the scaler leaves both out, and halves its scale."""
    ours = surgery.apply(bags(sparse), SPECS[row]())
    mirror = copy.deepcopy(ours)  # stepped without a scaler, and without the step in vain
    steps = optimizers(ours, sparse)
    beside = optimizers(mirror, sparse)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for seed in range(6):
        factor = float("inf") if seed == 3 else 1.0
        before = weights(ours)
        scaler.scale(ours(**batch(seed)) * factor).backward()
        for each in steps:
            scaler.unscale_(each)
            clip(each)
            scaler.step(each)
        scaler.update()
        for each in steps:
            each.zero_grad()
        if seed == 3:
            assert scaler.get_scale() == 512.0
            assert all(torch.equal(p, before[n]) for n, p in own(ours).items())
            continue
        mirror(**batch(seed)).backward()
        for each in beside:
            clip(each)
            each.step()
            each.zero_grad()
        for name, parameter in own(mirror).items():
            torch.testing.assert_close(own(ours)[name], parameter, rtol=1e-4, atol=1e-6, msg=name)
    assert state_of(ours).clock.step == state_of(mirror).clock.step


@pytest.mark.parametrize("row", ["exact", "misa", "lisa"])
def test_sparse_gradients_are_those_of_a_plain_model(row):
    plain = bags(True)
    ours = surgery.apply(copy.deepcopy(plain), SPECS[row]())
    trained = {c.weight for c in surgery.coordinates(ours)}
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in trained)
    both = [(model, optimizers(model, True)) for model in (plain, ours)]
    for seed in range(3):
        for model, each in both:
            model(**batch(seed)).backward()
            assert model.embed.weight.grad.is_sparse
            for optimizer in each:
                optimizer.step()
                optimizer.zero_grad()
    for name, parameter in own(plain).items():
        torch.testing.assert_close(own(ours)[name], parameter, rtol=1e-5, atol=1e-6, msg=name)
    assert state_of(ours).decision.methods and not torch.equal(
        own(ours)["embed.weight"], bags(True).embed.weight
    )


class Headed(nn.Module):
    """A head on a trunk that another model has, too."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks, self.out = blocks, nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.out(x).square().mean()


@pytest.mark.parametrize(
    "spec", [passes.Rso(rank=4), passes.Velora(groups=2)], ids=["rso", "velora"]
)
def test_an_optimizer_of_another_model_on_the_same_trunk_is_refused(spec):
    model = bags(False)
    other = Headed(model.blocks)
    surgery.apply(model, spec)
    ours = torch.optim.SGD(model.parameters(), lr=0.1)
    theirs = torch.optim.SGD(other.parameters(), lr=0.1)
    model(**batch(0)).backward()
    ours.step()
    ours.zero_grad()
    before = weights(model)
    other(torch.randn(4, 16)).backward()
    with pytest.raises(surgery.SurgeryError, match=r"blocks\..*another model shares the weight"):
        theirs.step()
    assert all(torch.equal(p, before[n]) for n, p in weights(model).items())
    # a penalty on a weight is stepped by who holds its coordinates
    ours.zero_grad()
    theirs.zero_grad()
    (model(**batch(1)) + model.blocks[0][0].weight.square().sum()).backward()
    ours.step()
    assert state_of(model).clock.step == 2
