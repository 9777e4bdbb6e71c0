"""Fine-tune SmolLM2 on several processes, under FSDP2 or DistributedDataParallel.

torchrun --nproc-per-node 2 -m examples.sharded --pass rso --wrap fsdp2 --steps 40
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging

import surgery
from examples.finetune import evaluate
from examples.real import kjv, smollm2, token_rows


def train(
    method: Annotated[str, typer.Option("--pass", help="Name of a pass.")] = "rso",
    wrap: Annotated[str, typer.Option(help="fsdp2 or ddp")] = "fsdp2",
    layers: Annotated[int | None, typer.Option(help="Use the first layers only.")] = None,
    steps: int = 40,
    length: int = 64,
    out: Path = Path("out/sharded"),
) -> None:
    """Train, each process on its share of every batch, and export a plain checkpoint."""
    logging.set_verbosity_error()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    if kind == "cuda":
        torch.cuda.set_device(rank)
    model: Any
    model, tokenizer = smollm2(layers)
    model.config.use_cache = False  # with it each block is captured by itself
    rows = token_rows(kjv(), tokenizer, length, 2 * world * steps + 8).to(kind)
    surgery.apply(model.to(kind), method)
    outer = model
    if wrap == "ddp":
        outer = DistributedDataParallel(model, find_unused_parameters=True)
    else:
        mesh = init_device_mesh(kind, (world,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    before = evaluate(model, rows[:8])
    for batch in rows[8:].split(2 * world):
        ids = batch.chunk(world)[rank]
        outer(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = evaluate(model, rows[:8])
    surgery.export(model, out)
    if rank == 0:
        print(f"held-out loss {before:.4f} -> {after:.4f}; plain checkpoint: {out}")
    del outer  # DDP first: a group that it still holds may wait for Python's lock when it ends
    distributed.destroy_process_group()


if __name__ == "__main__":
    typer.run(train)
