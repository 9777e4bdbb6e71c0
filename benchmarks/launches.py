"""Operations that a step would launch on an accelerator, counted on any machine.

`python -m benchmarks.launches [--json FILE] [--hidden N] [ROW ...]`: one step (forward, backward,
optimizer) of a bf16 Llama of 4 blocks under each pass and without surgery, in the form that
accelerators run. Views and allocations launch nothing; what is compiled counts as one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import passes
import surgery
from benchmarks.common import machine
from surgery.kernels import plan

# Allocations; _unsafe_view is a view, too.
FREE = ("promote_types", "_unsafe_view", "_record_function_enter_new", "_record_function_exit")
FREE += ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh")
WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")  # the host waits for a value

PASSES: dict[str, Callable[[], Any]] = {
    "eager": lambda: None,
    "misa": lambda: passes.Misa(budget=0.1),
    "misa 100 %": lambda: passes.Misa(budget=1.0),
    "lisa": lambda: passes.Lisa(layers=1),
    "badam": lambda: passes.BAdam(),
    "recompute": lambda: passes.Recompute(),
    "chunked_loss": lambda: passes.ChunkedLoss(),
    "recompute + chunked_loss": lambda: [passes.Recompute(), passes.ChunkedLoss()],
    "misa + recompute + chunked_loss": lambda: [
        passes.Misa(budget=0.1),
        passes.Recompute(),
        passes.ChunkedLoss(),
    ],
    "rso": lambda: passes.Rso(),
    "velora": lambda: passes.Velora(init="random"),
    "galore": lambda: passes.Galore(),
    "galore + recompute + chunked_loss": lambda: [
        passes.Galore(),
        passes.Recompute(),
        passes.ChunkedLoss(),
    ],
    "rso + recompute + chunked_loss": lambda: [
        passes.Rso(),
        passes.Recompute(),
        passes.ChunkedLoss(),
    ],
    "compress": lambda: passes.Compress(),
    "recompute + chunked_loss + compress": lambda: [
        passes.Recompute(),
        passes.ChunkedLoss(),
        passes.Compress(),
    ],
    "mezo": lambda: passes.Mezo(),
    "mezo gaussian": lambda: passes.Mezo(noise="gaussian"),
    "sparse_mezo": lambda: passes.SparseMezo(),
    "lozo": lambda: passes.Lozo(),
    "subzero": lambda: passes.SubZero(),
}
BY_FORWARDS = ("mezo", "mezo gaussian", "sparse_mezo", "lozo", "subzero")


class Launches(TorchDispatchMode):
    """Counts what is dispatched inside: `names` of launches, `waits` of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.waits = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # or Dynamo would run the plain model under us

    def launched(self) -> None:
        """Note one compiled function."""
        self.names["compiled"] += 1

    @property
    def count(self) -> int:
        return sum(self.names.values())

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name in WAITING:
            self.waits += 1
        elif name not in FREE and not _is_view(function):
            self.names[name] += 1
        return function(*args, **kwargs or {})


def _is_view(function: Any) -> bool:
    returns = function._schema.returns
    aliases = [r.alias_info for r in returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)


def llama(hidden: int = 256, layers: int = 4) -> nn.Module:
    """Make the model: bf16, random weights, vocabulary 8,192."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model: Any = transformers.LlamaForCausalLM(config)
    return model.to(torch.bfloat16).train()


def batch(rows: int = 2, length: int = 64) -> dict[str, Tensor]:
    ids = torch.randint(0, 8192, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def step(row: str, hidden: int = 256, layers: int = 4) -> Launches:
    """Return what the third step of a row launches, after two to warm up."""
    model, inputs = llama(hidden, layers), batch()
    with plan.forced("accelerator"):
        spec = PASSES[row]()
        if spec is not None:
            surgery.apply(model, spec)
        if row in BY_FORWARDS:
            optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        found = Launches()
        for _ in range(3):
            found = Launches()
            with found:
                loss = model(**inputs).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    return found


def weights(hidden: int = 256, layers: int = 4) -> int:
    """Return the number of weights of the model."""
    with torch.device("meta"):
        return len(list(llama(hidden, layers).parameters()))


def forward(hidden: int = 256, layers: int = 4) -> int:
    """Return what one forward without gradients launches."""
    model, inputs, found = llama(hidden, layers), batch(), Launches()
    with torch.no_grad(), found:
        model(**inputs)
    return found.count


def main(
    rows: Annotated[list[str] | None, typer.Argument(help="of the table; all by default")] = None,
    hidden: int = 256,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    names: Annotated[bool, typer.Option(help="print the operations, too")] = False,
) -> None:
    """Print the operations of one step of each row."""
    found = {}
    for row in rows or PASSES:
        counted = step(row, hidden)
        found[row] = {"launches": counted.count, "waits": counted.waits}
        print(f"{row:40} {counted.count:6,} launches {counted.waits:4} waits", flush=True)
        if names:
            print("   ", ", ".join(f"{n} {c}" for n, c in counted.names.most_common(30)))
    if json_file is not None:
        result = {"machine": machine(), "hidden": hidden, "rows": found}
        json_file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
