"""Two processes under FSDP2: the run of one process on the joined batch, saves and all."""

from __future__ import annotations

import pytest
import torch
from laws import adamw, anatomy, run_two_ranks, state_of, weights
from models import inputs_of, make
from ranks import SHARDED, load_distributed, start, steps
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import passes
import surgery

HEAD = """
    import sys; sys.path.insert(0, "tests")
    import torch
    from laws import state_of
    from ranks import (
        assert_same, begin, count_scattered, load_distributed, start, state_of_all, steps,
        whole_weights,
    )
    import surgery

    rank = begin()
"""

EQUAL = (
    HEAD
    + """
    orders, BOTH = ("apply, shard", "shard, apply"), ("misa", "rso", "galore_svd", "mezo")
    for number, row in enumerate(ROWS):
        alone, optimizer = start(row, None)
        expected = steps(alone, optimizer, range(11), None)  # five rounds of two steps are drawn
        # both for a pass of each kind, one of them for its relatives
        # (what is trained by forwards beside what is by backward is not cut behind it)
        own = orders if row in BOTH else orders[number % 2 :][:1]
        for order in orders[:1] if row == "mezo_hybrid" else own:
            both, optimizer = start(row, order)
            sent = count_scattered()
            drawn = steps(both, optimizer, range(11), rank)
            assert state_of(both).clock.step == 11 and drawn == expected, (row, order)
            found = whole_weights(both)
            for name, value in whole_weights(alone).items():
                torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9, msg=row)
                assert_same(found[name], (row, name))
            active = sum(c.parameter.numel() for c in surgery.coordinates(both) if c.active)
            if row in ("rso", "mezo"):  # what travels is what is trained, up to padding
                assert all(n <= active + 16 for n in sent), (row, order, sent, active)
            if row == "misa":
                dense = sum(p.numel() for p in alone.parameters())
                assert 0 < sum(sent) / 11 < 0.62 * dense, (sent, dense)
            surgery.remove(both)
    print("equal")
"""
)


@pytest.mark.parametrize(
    "rows",
    [
        ["misa", "lisa", "badam", "velora", "rso", "rso_transport", "galore", "galore_svd"]
        + ["misa_of_rso", "recompute", "lisa_outliers", "mezo", "mezo_blocks", "mezo_hybrid"]
        + ["sparse_mezo", "lozo", "subzero"],
        ["chunked_loss"],
    ],
    ids=str,
)
def test_two_ranks_are_one_process_on_the_joined_batch(rows, tmp_path):
    assert set(rows) <= set(SHARDED)
    run_two_ranks(EQUAL.replace("ROWS", repr(rows)), tmp_path)


NARROW = (
    HEAD
    + """
    from ranks import DTYPES

    def moved(row, order, dtype, rate):
        DTYPES[row] = dtype
        model, _ = start(row, order)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
        before = whole_weights(model)
        steps(model, optimizer, range(120), None if order is None else rank)
        for name, value in whole_weights(model).items():
            if order:
                assert_same(value, (row, name))
        if order and dtype == torch.bfloat16 and row != "rso":
            ours = [p for n, p in model.named_parameters() if "surgery_coordinates" in n]
            held = {i: p.to_local() for i, p in enumerate(ours)}
            active = [c for c in surgery.coordinates(model) if c.active]
            assert held and all(p.dtype == torch.float32 for p in held.values())
            assert all(c.parameter.device_mesh.size() == 2 for c in active)
            largest = max(p.numel() for p in held.values())
            own = sum(c.parameter.to_local().numel() for c in active)
            stored = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in held.values()}
            total = sum(s.nbytes() for s in stored.values())
            assert total <= 4 * (own + largest), (row, total, own, largest)
        after = whole_weights(model)
        surgery.remove(model)
        return torch.cat([(after[n].double() - before[n].double()).flatten() for n in before])

    for row, order, rate in (
        ("misa", "apply, shard", 1e-4),
        ("misa", "shard, apply", 3e-5),
        ("badam", "shard, apply", 1e-4),
        ("rso", "apply, shard", 1e-4),
    ):
        found = moved(row, order, torch.bfloat16, rate)
        if rank == 0:
            exact = moved(row, None, torch.float32, rate)
            share = float(found @ exact / (exact @ exact))
            assert abs(share - 1) < 0.03, (row, order, rate, share)
    print("equal")
"""
)


def test_steps_into_bfloat16_are_not_lost(tmp_path):
    """Copies of sampled weights are cut as the weights; what a rank holds of them is float32."""
    run_two_ranks(NARROW, tmp_path)


LLAMA = (
    HEAD
    + """
    alone, optimizer = start("all", None, "llama", num_hidden_layers=2, use_cache=False)
    steps(alone, optimizer, range(5), None, "llama")
    both, optimizer = start("all", "apply, shard", "llama", num_hidden_layers=2, use_cache=False)
    steps(both, optimizer, range(5), rank, "llama")
    assert state_of(both).dispatch.captures <= 6  # the blocks share one
    found = whole_weights(both)
    for name, value in whole_weights(alone).items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9, msg=name)
    surgery.export(both, FOLDER)
    import json, pathlib, transformers
    if rank == 0:
        assert json.loads(pathlib.Path(FOLDER, "config.json").read_text())["architectures"] == [
            "LlamaForCausalLM"
        ]
        plain = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float64)
        for name, value in plain.named_parameters():
            assert torch.equal(value, found[name]), name
    print("equal")
"""
)


def test_a_transformer_is_trained_and_exported(tmp_path):
    run_two_ranks(LLAMA.replace("FOLDER", repr(str(tmp_path / "out"))), tmp_path)


SAVED = (
    HEAD
    + """
    import torch.distributed.checkpoint as dcp

    folder = FOLDER

    for row in ("misa", "misa of bfloat16", "rso", "mezo"):
        model, optimizer = start(row, "apply, shard")
        steps(model, optimizer, range(3), rank)
        surgery.save(model, f"{folder}/{row}", optimizer)
        surgery.save(model, f"{folder}/{row}_beside", optimizer, weights=False)
        dcp.save(state_of_all(model, optimizer), checkpoint_id=f"{folder}/{row}_dcp")
        saved = whole_weights(model)
        steps(model, optimizer, range(3, 8), rank)
        expected = whole_weights(model)

        again, fresh = start(row, "shard, apply" if row == "misa" else "apply, shard")
        surgery.load(again, f"{folder}/{row}", fresh)
        steps(again, fresh, range(3, 8), rank)
        for name, value in whole_weights(again).items():
            assert torch.equal(value, expected[name]), (row, name)

        other, fresh = start(row, "apply, shard")
        load_distributed(other, fresh, f"{folder}/{row}_dcp")
        for name, value in whole_weights(other).items():
            assert torch.equal(value, saved[name]), (row, name)
        assert state_of(other).clock.step == 3
        steps(other, fresh, range(3, 8), rank)
        for name, value in whole_weights(other).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-14)
        if rank == 0:
            torch.save(expected, f"{folder}/{row}.pt")
    print("equal")
"""
)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_saves_are_resumed_on_another_number_of_ranks(tmp_path):
    """Two ranks save; two go on to the bit, by our file and torch's; one process goes on too."""
    run_two_ranks(SAVED.replace("FOLDER", repr(str(tmp_path))), tmp_path)
    for row in ("misa", "rso", "mezo"):
        model, optimizer = start(row, None)
        if row == "rso":
            load_distributed(model, optimizer, str(tmp_path / f"{row}_dcp"))
        else:
            surgery.load(model, tmp_path / row, optimizer)
        with pytest.raises(surgery.CheckpointError, match="has others than it had"):
            surgery.load(
                surgery.apply(make("plain", seed=5).double(), SHARDED[row]()),
                tmp_path / f"{row}_beside",
                False,
            )
        steps(model, optimizer, range(3, 8), None)
        expected = torch.load(tmp_path / f"{row}.pt", weights_only=True)
        for name, value in weights(model).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-9)


@pytest.fixture(scope="module")  # meshes outlive their group: a second one in a process would crash
def alone(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def blocks_of(model, mesh):
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return model


def test_what_fsdp_would_break_is_refused(alone):
    tokens = inputs_of("plain")["tokens"]
    parts = surgery.apply(make("plain"), passes.Misa(budget=0.2))
    fully_shard(blocks_of(parts, alone), mesh=alone)
    with pytest.raises(surgery.ModelError, match=r"in parts, such as .*\[.*\]"):
        parts(tokens, tokens)
    outside = surgery.apply(make("plain"), passes.Misa(budget=0.6, always=["embed.weight"]))
    with pytest.raises(surgery.ModelError, match=r"fully_shard\(model\)"):
        blocks_of(outside, alone)(tokens, tokens)
    mixed = fully_shard(blocks_of(make("plain"), alone), mesh=alone)
    before = anatomy(mixed)
    with pytest.raises(surgery.ModelError, match=r"Call surgery.apply first"):
        surgery.apply(mixed, passes.Rso(rank=4, always=".*norm.*"))
    assert anatomy(mixed) == before
    judged = surgery.apply(make("plain"), "mezo", update="conservative")
    fully_shard(blocks_of(judged, alone), mesh=alone)
    start = {n: p.full_tensor().clone() for n, p in judged.named_parameters()}
    judged(tokens, tokens).backward()
    with pytest.raises(surgery.OptimizerError, match=r"conservative.*FSDP2 keeps its weights"):
        torch.optim.SGD(judged.parameters(), lr=1e-3).step()
    assert all(torch.equal(p.full_tensor(), start[n]) for n, p in judged.named_parameters())


@pytest.mark.parametrize("spec", [passes.Misa(budget=0.6), passes.Rso(rank=4)], ids=str)
def test_tensor_parallelism_is_refused(alone, spec):
    model = make("plain")
    parallelize_module(model.blocks[0], alone, {"up": ColwiseParallel()})
    before = anatomy(model)
    with pytest.raises(surgery.ModelError, match=r"blocks.0.up.weight is a DTensor in forward"):
        surgery.apply(model, spec)
    assert anatomy(model) == before


def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(alone):
    model = surgery.apply(make("plain"), passes.Misa(budget=0.6))
    fully_shard(blocks_of(model, alone), mesh=alone)
    optimizer = adamw(model)
    tokens = inputs_of("plain")["tokens"]
    model(tokens, tokens).backward()
    before = {n: p.full_tensor().clone() for n, p in model.named_parameters()}
    poisoned = next(c.parameter for c in surgery.coordinates(model) if c.active)
    poisoned.grad.to_local().view(-1)[0] = float("nan")
    optimizer.step()
    assert state_of(model).clock.skipped == 1
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), before[name])


def test_fsdp1_is_refused():
    """It cannot be built on a CPU: the wrapper without its work, then what that leaves behind."""
    outer = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    torch.nn.Module.__init__(outer)
    outer.module = make("plain")
    with pytest.raises(surgery.ModelError, match=r"FSDP1.*fully_shard"):
        surgery.apply(outer, "misa", budget=0.6)
    model = surgery.apply(make("plain"), passes.Velora(groups=4))
    flat = model.blocks[0].up._parameters.pop("weight").detach()
    model.blocks[0].up.weight = flat  # a view of the flat parameter, in forward
    tokens = inputs_of("plain")["tokens"]
    with pytest.raises(surgery.ModelError, match=r"blocks.0.up.weight is not a param.*FSDP1"):
        model(tokens, tokens)


@pytest.mark.parametrize("mark", ["ds_id", "_hp_mapping"])
def test_deepspeed_is_refused(mark):
    """What ZeRO-3 (ds_id) and ZeRO-1/2 (_hp_mapping) leave on parameters; it is not installed."""
    model = make("plain")
    setattr(model.blocks[0].up.weight, mark, 3)
    with pytest.raises(surgery.ModelError, match="DeepSpeed"):
        surgery.apply(model, "misa", budget=0.5)
    tokens = inputs_of("plain")["tokens"]
    later = surgery.apply(make("plain"), "misa", budget=0.6)
    setattr(later.blocks[0].up.weight, mark, 3)
    with pytest.raises(surgery.ModelError, match="DeepSpeed"):
        later(tokens, tokens)
