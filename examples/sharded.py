"""Train on several GPUs, or processes on CPUs, under FSDP2 or DistributedDataParallel.

    torchrun --nproc-per-node 2 sharded.py notes.txt --model Qwen/Qwen3-1.7B
    torchrun --nproc-per-node 2 sharded.py notes.txt --pass misa --wrap ddp

Surgery comes before the wrap. Each process takes its share of every batch; the run is that of one
process on the joined batch. Under FSDP2 each process holds its share of weights, gradients and
optimizer state, under DDP all of the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery


def main(
    data: Annotated[Path | None, typer.Argument(help="A text.")] = None,
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
    method: Annotated[str, typer.Option("--pass", help="Name of a pass.")] = "rso",
    wrap: Literal["fsdp2", "ddp"] = "fsdp2",
    out: Path = Path("out/sharded"),
    steps: int = 40,
    batch: Annotated[int, typer.Option(help="Rows of each process in a step.")] = 2,
    length: int = 64,
    lr: float = 3e-4,
) -> None:
    """Train, and write a plain checkpoint from all processes."""
    if data is None:  # in a clone of the repository there is some text
        try:
            from examples.real import sample
        except ImportError:
            raise SystemExit("Which text? torchrun ... sharded.py notes.txt") from None
        data, model = sample("text", model)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    if kind == "cuda":
        torch.cuda.set_device(rank)
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    lm: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    lm.to(kind).train()
    ids = AutoTokenizer.from_pretrained(model)(data.read_text(), return_tensors="pt").input_ids[0]
    rows = ids.to(kind).unfold(0, length, length)

    surgery.apply(lm, method)
    outer = lm
    if wrap == "ddp":
        outer = DistributedDataParallel(lm, find_unused_parameters=True)
    else:
        mesh = init_device_mesh(kind, (world,))
        for block in lm.model.layers:  # where they stand in Llama, Qwen, Mistral and Gemma
            fully_shard(block, mesh=mesh)
        fully_shard(lm, mesh=mesh)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=lr)
    torch.manual_seed(0)  # all processes draw the same rows, and take turns
    for step in range(1, steps + 1):
        inputs = rows[torch.randint(len(rows), (world * batch,))[rank::world]]
        # A cache would have each block captured by itself.
        loss = outer(input_ids=inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step} of {steps}, loss {loss.item():.3f} of its rows", flush=True)
    surgery.export(lm, out)
    del outer  # DDP first: a group that it still holds may wait for Python's lock when it ends
    distributed.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
