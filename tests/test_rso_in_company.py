"""rso in company: modules drawn by misa, several processes, conflicts."""

from __future__ import annotations

import pytest
import torch
from laws import method_of, run_two_ranks
from models import inputs_of, loss_of, make

import passes
import surgery
from surgery.memory import measure
from surgery.sampling.rounds import Rounds


def test_misa_samples_the_modules_that_rso_trains():
    model = make("llama", num_hidden_layers=2)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    chosen = [passes.Misa(budget=0.2, period=2), passes.Rso(rank=4, period=50)]
    surgery.apply(model, chosen)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs = inputs_of("llama", rows=4, length=32)
    seen: set[str] = set()
    for step in range(8):
        loss_of(model, inputs).backward()
        live = {c.weight for c in surgery.coordinates(model) if c.active}
        with_gradient = {
            c.weight for c in surgery.coordinates(model) if c.parameter.grad is not None
        }
        assert with_gradient == live and 0 < len(live) < 21
        size = sum(model.get_parameter(name).numel() for name in live)
        assert size <= 0.2 * sum(p.numel() for p in make("llama", num_hidden_layers=2).parameters())
        optimizer.step()
        optimizer.zero_grad()
        seen |= live
        assert {
            c.weight for c in surgery.coordinates(model) if optimizer.state[c.parameter]
        } <= live
        moved = {n for n, p in start.items() if not torch.equal(p, model.get_parameter(n))}
        assert moved == seen, step
    assert len(seen) > len(live)
    for c in surgery.coordinates(model):
        if c.weight in seen:
            b = c.parameter.detach()
            change = model.get_parameter(c.weight).detach() - start[c.weight]
            torch.testing.assert_close(c.expand(b), change, atol=1e-6, rtol=1e-4)


def test_nothing_is_kept_for_modules_that_are_not_sampled():
    inputs = inputs_of("llama", rows=4, length=32)
    misa, rso = passes.Misa(budget=0.2), passes.Rso(rank=4)

    def live(chosen) -> int:
        model = surgery.apply(make("llama", num_hidden_layers=2), chosen)
        loss_of(model, inputs).backward()
        found = measure(lambda: loss_of(model, inputs), torch.device("cpu")).live
        assert surgery.report(model, inputs).after.activations == found
        return found

    assert live([misa, rso]) < min(live(misa), live(rso))  # the same modules in the first round


def test_scores_of_projected_modules_are_those_of_their_weights():
    """E ||dB||^2 = ||dW||^2: a module's score does not depend on its rank, nor on its width."""
    plain = make("plain")
    inputs = inputs_of("plain")
    loss_of(plain, inputs).backward()
    name = "blocks.1.down.weight"
    wanted = plain.get_parameter(name).grad.square().mean().item()
    options = dict(period=99, budget=0.9, targets=[name])
    model = surgery.apply(make("plain"), [passes.Misa(**options), passes.Rso(period=1, rank=8)])
    (piece,) = method_of(model, Rounds).units[name]
    piece.watched = True
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.0), []
    for _ in range(30):  # another projection after each step
        loss_of(model, inputs).backward()
        found.append(method_of(model, Rounds)._squared(1.0)[name])
        optimizer.step()
        optimizer.zero_grad()
    assert len(set(found)) == 30
    assert abs(sum(found) / 30 - wanted) < 0.2 * wanted


def test_what_misa_cannot_draw_as_a_whole_is_a_conflict():
    with pytest.raises(
        surgery.ConflictError, match=r"raise budget=, so that it is drawn as a whole"
    ):
        surgery.apply(
            make("llama", num_hidden_layers=2), [passes.Misa(budget=0.03), passes.Rso(rank=4)]
        )
    with pytest.raises(surgery.ConflictError, match=r"momentum_step=True updates .* itself"):
        surgery.apply(
            make("llama", num_hidden_layers=2),
            [passes.Misa(budget=0.5, momentum_step=True), passes.Rso(rank=4)],
        )


RANK = """
    import sys, torch, torch.distributed as dist
    sys.path[:0] = ["tests"]
    import surgery
    from models import inputs_of, loss_of, make
    from ranks import assert_same, begin, count_sent
    from torch.nn.parallel import DistributedDataParallel
    rank = begin()
    batches = [inputs_of("plain", rows=4, seed=seed) for seed in range(5)]

    def train(model, cut):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for batch in batches:
            loss_of(model, {k: cut(v) for k, v in batch.items()}).backward()
            optimizer.step()
            optimizer.zero_grad()

    model = surgery.apply(make("plain").double(), "rso", rank=4, period=2)
    parallel = DistributedDataParallel(model)
    sent = count_sent(parallel)
    train(parallel, lambda v: v.chunk(2)[rank])
    numbers = sum(c.parameter.numel() for c in surgery.coordinates(model))
    assert sum(sent) == len(batches) * numbers, (sent, numbers)
    alone = surgery.apply(make("plain").double(), "rso", rank=4, period=2)
    train(alone, lambda v: v)
    for name in [name for name, _ in make("plain").named_parameters()]:
        weight = alone.get_parameter(name)
        torch.testing.assert_close(model.get_parameter(name), weight, msg=name)
        assert_same(model.get_parameter(name), name)
    print("equal")
    dist.destroy_process_group()
"""


def test_under_data_parallelism_only_the_coordinates_travel(tmp_path):
    run_two_ranks(RANK, tmp_path)
