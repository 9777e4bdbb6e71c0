"""What the scripts of tests on two processes share; `laws.run_two_ranks` runs them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from laws import ZEROTH
from models import inputs_of, loss_of, make
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import passes
import surgery
from surgery.weights import shards
from surgery.weights.table import TABLE


def begin() -> int:
    """Join the other process; return our rank."""
    rank, store = int(sys.argv[1]), sys.argv[2]
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    return rank


def count_sent(outer: DistributedDataParallel) -> list[int]:
    """Return a list that grows by the numbers of each bucket that is sent."""
    sent: list[int] = []

    def hook(state, bucket):
        sent.append(bucket.buffer().numel())
        return allreduce_hook(state, bucket)

    outer.register_comm_hook(None, hook)
    return sent


def assert_same(value: torch.Tensor, label: object = "") -> None:
    """Both processes hold the same bits."""
    others = [torch.empty_like(value) for _ in range(2)]
    distributed.all_gather(others, value.detach().contiguous())
    assert torch.equal(*others), label


# -- FSDP2 -----------------------------------------------------------------------------------------

# Rows whose weights are drawn as a whole: FSDP2 cuts them in its own way.
SHARDED = {
    "misa": lambda: passes.Misa(budget=0.6, period=2, always=".*norm.*"),
    "lisa": lambda: passes.Lisa(layers=1, period=2),
    "lisa_outliers": lambda: passes.Lisa(layers=1, weights="outliers", threshold=1.9, period=2),
    "badam": lambda: passes.BAdam(period=2),
    "velora": lambda: passes.Velora(groups=4, period=2),
    "rso": lambda: passes.Rso(rank=4, period=2),
    "rso_transport": lambda: passes.Rso(
        rank=4, period=2, on_resample="transport", weight_decay=0.1
    ),
    "galore": lambda: passes.Galore(rank=4, period=2, weight_decay=0.1),
    "galore_svd": lambda: passes.Galore(rank=4, period=3, projection="svd", on_resample="project"),
    "misa_of_rso": lambda: [passes.Misa(budget=0.5, period=2), passes.Rso(rank=4, period=3)],
    "recompute": lambda: passes.Recompute(),
    "chunked_loss": lambda: passes.ChunkedLoss(),
    "compress": lambda: passes.Compress(),
    "all": lambda: [
        passes.Misa(budget=0.3, period=2),
        passes.Rso(rank=4, period=3),
        passes.Recompute(),
        passes.ChunkedLoss(),
    ],
    "mezo": lambda: passes.Mezo(eps=1e-4, directions=2, weight_decay=0.1),
    "mezo_hybrid": lambda: passes.Mezo(eps=1e-4, backward=r"blocks\.1.*"),
    "mezo_blocks": lambda: passes.Mezo(eps=1e-4, blocks=1, directions=2, update="sign"),
    "sparse_mezo": lambda: passes.SparseMezo(
        keep_fraction=0.5, eps=1e-4, threshold="period", period=2
    ),
    "lozo": lambda: passes.Lozo(eps=1e-4, period=2),
    "subzero": lambda: passes.SubZero(eps=1e-4, rank=4, period=2),
    "sherl": lambda: passes.Sherl(),
}


DTYPES = dict.fromkeys(SHARDED, torch.float64) | {"misa of bfloat16": torch.bfloat16}
SHARDED["misa of bfloat16"] = SHARDED["misa"]


def start(row: str, order: str | None, family: str = "plain", **options: Any) -> Any:
    """Return a model with a pass, sharded before or after it (None: not), and its optimizer.

    order: "DDP" for that, of what is returned the wrapper.
    """
    model = make(family, **options).to(DTYPES[row])
    if order == "shard, apply":
        shard(model)
    surgery.apply(model, SHARDED[row]())
    if order == "apply, shard":
        shard(model)
    if order == "DDP":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    if row in ZEROTH:
        return model, torch.optim.SGD(model.parameters(), lr=1e-2)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)


def steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    seeds: Iterable[int],
    rank: int | None,
    family: str = "plain",
) -> list[list[bool]]:
    """Train on the batch of each seed, or a rank's half of it; return what was drawn."""
    drawn = []
    for seed in seeds:
        inputs = inputs_of(family, rows=4, seed=seed)
        if rank is not None:
            inputs = {k: v.chunk(2)[rank] for k, v in inputs.items()}
        loss_of(model, inputs).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        drawn.append([c.active for c in surgery.coordinates(model)])
    return drawn


def state_of_all(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what torch.distributed.checkpoint saves of a run, and loads into."""
    own, moments = get_state_dict(model, optimizer)
    return {"model": own, "optimizer": moments, "surgery": surgery.Stateful(model)}


def load_distributed(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
    """Load such a save; of what was not being trained then, nothing was saved."""
    state = state_of_all(model, optimizer)
    planner = DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(state, checkpoint_id=folder, planner=planner)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=False),
    )


def shard(model: nn.Module) -> nn.Module:
    """`fully_shard` each block, then the whole."""
    mesh = init_device_mesh("cpu", (2,))
    for block in getattr(model, "blocks", None) or model.get_submodule("model.layers"):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the model's own weights, whole, without the table's."""
    model = getattr(model, "module", model)  # of DDP
    found = {n: p for n, p in model.named_parameters() if not n.startswith(TABLE)}
    return {n: shards.whole(p.detach()).clone() for n, p in found.items()}


def count_scattered() -> list[int]:
    """Return a list that grows by the numbers of each gradient that FSDP2 sends."""
    sent: list[int] = []
    name = "reduce_scatter_single"
    name = name if hasattr(distributed, name) else "reduce_scatter_tensor"  # torch 2.11
    plain = getattr(distributed, name)

    def counting(*args: object, **kwargs: object) -> object:
        source = kwargs.get("input", args[1] if len(args) > 1 else None)
        assert isinstance(source, torch.Tensor)
        sent.append(source.numel())
        return plain(*args, **kwargs)

    setattr(distributed, name, counting)
    return sent
