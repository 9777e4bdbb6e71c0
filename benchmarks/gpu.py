"""Every pass on one GPU, in a script that fits eight minutes: correctness, whole steps, gpu tests.

`python -m benchmarks.gpu [--seconds 480] [--part correctness] [--profile ROW] [ROW ...]`

steps: a Llama of 1.24 B parameters (hidden 2048, 16 layers, vocabulary 128,256, tied), bfloat16,
4 x 2,048 tokens, random weights, fused AdamW (SGD for the zeroth-order passes): the median of six
steps after two, and the peak of the whole step, weights and state included. One forked process a
row; peers that are not installed say so in their row. correctness: families x passes in float32,
bfloat16 and under autocast; the first loss beside eager's on the device, and in float32 the losses
of six steps beside the CPU's. `--device cpu --tiny` tries the script on any machine.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor, nn
from torch.nn import functional

import passes
import surgery

LLAMA: dict[str, Any] = dict(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128_256,
    tie_word_embeddings=True,
    max_position_embeddings=4096,
)
TINY: dict[str, Any] = LLAMA | dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=1000,
)  # fmt: skip
WARM, TIMED = 2, 6


@dataclass(frozen=True)
class Setting:
    """Where and on what rows run."""

    device: str = "cuda"
    tiny: bool = False

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**(TINY if self.tiny else LLAMA))
        with torch.device(self.device), _default(torch.bfloat16):
            model = transformers.LlamaForCausalLM(config)
        model.config.use_cache = False
        return model.train()

    def batch(self) -> dict[str, Tensor]:
        rows, length = (2, 32) if self.tiny else (4, 2048)
        generator = torch.Generator().manual_seed(1)
        size = (TINY if self.tiny else LLAMA)["vocab_size"]
        ids = torch.randint(0, int(size), (rows, length), generator=generator).to(self.device)
        return {"input_ids": ids, "labels": ids}


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# -- rows: setting -> a function that makes one step and returns its loss --------------------------

Step = Callable[[], Tensor]


def loop(model: Any, batch: dict[str, Tensor], sgd: bool = False, loss: Any = None) -> Step:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if sgd:
        optimizer = torch.optim.SGD(trained, lr=1e-6)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> Tensor:
        found = model(**batch).loss if loss is None else loss(model, batch)
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        return found.detach()

    return step


def prepared(setting: Setting, checkpointed: bool, lora: bool) -> Any:
    model: Any = setting.model()
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def ours(
    *spec: Any, checkpointed: bool = False, lora: bool = False, sgd: bool = False, **options: Any
) -> Callable[[Setting], Step]:
    def begin(setting: Setting) -> Step:
        model = prepared(setting, checkpointed, lora)
        surgery.apply(model, [make() for make in spec], **options)
        return loop(model, setting.batch(), sgd)

    return begin


def eager(
    checkpointed: bool = False,
    lora: bool = False,
    liger: bool = False,
    compiled: bool = False,
    budget: float | None = None,
) -> Callable[[Setting], Step]:
    def begin(setting: Setting) -> Step:
        if liger:
            from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
                apply_liger_kernel_to_llama,
            )

            apply_liger_kernel_to_llama(
                rope=True, swiglu=True, rms_norm=True, cross_entropy=False,
                fused_linear_cross_entropy=True,
            )  # fmt: skip
        model = prepared(setting, checkpointed, lora)
        if budget is not None:
            from torch._functorch import config as functorch

            functorch.activation_memory_budget = budget
        if compiled:
            model = torch.compile(model, dynamic=False)
        return loop(model, setting.batch())

    return begin


def fused_head(setting: Setting) -> Step:
    """torch's own linear_cross_entropy (2.13 and newer) in the place of head and loss."""
    fused: Any = functional.linear_cross_entropy  # pyright: ignore[reportAttributeAccessIssue]

    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state[:, :-1]
        target = batch["labels"][:, 1:].flatten()
        return fused(hidden.flatten(0, 1), model.lm_head.weight, target)

    return loop(setting.model(), setting.batch(), loss=loss)


def published_mezo(setting: Setting) -> Step:
    """MeZO as published: four sweeps over the weights in place (arXiv 2305.17333, Algorithm 1)."""
    model, batch = setting.model().eval(), setting.batch()
    steps = 0

    def sweep(scale: float) -> None:
        torch.manual_seed(steps)
        for p in model.parameters():
            z = torch.normal(0.0, 1.0, size=p.shape, device=p.device, dtype=p.dtype)
            p.data.add_(z, alpha=scale)

    @torch.no_grad()
    def step() -> Tensor:
        nonlocal steps
        steps += 1
        sweep(1e-3)
        first = model(**batch).loss
        sweep(-2e-3)
        second = model(**batch).loss
        sweep(1e-3)
        sweep(-1e-6 * float(first - second) / 2e-3)
        return first

    return step


R, C = passes.Recompute, passes.ChunkedLoss


def _misa() -> Any:
    return passes.Misa(budget=0.03)


def _misa_all() -> Any:
    return passes.Misa(budget=1.0, period=1 << 20)


ROWS: dict[str, Callable[[Setting], Step]] = {
    "eager AdamW": eager(),
    "recompute + chunked_loss": ours(R, C),
    "misa 3 % + recompute + chunked_loss": ours(_misa, R, C),
    "rso + recompute + chunked_loss": ours(passes.Rso, R, C),
    "velora + recompute + chunked_loss": ours(passes.Velora, R, C),
    "MeZO as published": published_mezo,
    "mezo": ours(passes.Mezo, sgd=True),
    "recompute + chunked_loss + checkpointing": ours(R, C, checkpointed=True),
    "misa 3 % + chunked_loss + checkpointing": ours(_misa, C, checkpointed=True),
    "recompute + chunked_loss + compress": ours(R, C, passes.Compress),
    "misa 100 %": ours(_misa_all),
    "sparse_mezo": ours(passes.SparseMezo, sgd=True),
    "lozo": ours(passes.Lozo, sgd=True),
    "subzero": ours(passes.SubZero, sgd=True),
    "Liger": eager(liger=True),
    "Liger + checkpointing": eager(liger=True, checkpointed=True),
    "checkpointing": eager(checkpointed=True),
    "linear_cross_entropy": fused_head,
    "torch.compile": eager(compiled=True),
    "recompute": ours(R),
    "chunked_loss": ours(C),
    "misa 3 %": ours(_misa),
    "badam": ours(passes.BAdam),
    "lisa": ours(passes.Lisa),
    "rso": ours(passes.Rso),
    "velora": ours(passes.Velora),
    "misa 3 % + recompute + chunked_loss + compress": ours(_misa, R, C, passes.Compress),
    "LoRA r=16": eager(lora=True),
    "LoRA + checkpointing": eager(lora=True, checkpointed=True),
    "LoRA + recompute + chunked_loss": ours(R, C, lora=True),
    "LoRA + velora + recompute + chunked_loss": ours(passes.Velora, R, C, lora=True),
    "recompute + chunked_loss, eager kernels": ours(R, C, compile=False),
    'recompute + chunked_loss, backend="inductor"': ours(R, C, backend="inductor"),
    "torch.compile, memory budget 0.5": eager(compiled=True, budget=0.5),
}


def measured(name: str, setting: Setting, profile: bool) -> dict[str, Any]:
    """Return what one row takes: `ms`, `peak` bytes, `start` seconds, losses, kernels."""
    began = time.time()
    step = ROWS[name](setting)
    losses = [float(step()) for _ in range(WARM)]
    found: dict[str, Any] = {"start": round(time.time() - began, 1)}
    if setting.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(TIMED):
            begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
            begin.record()
            last = step()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        found |= {"peak": torch.cuda.max_memory_allocated(), "ms": statistics.median(times)}
        if "MeZO" not in name:
            torch.cuda.set_sync_debug_mode("warn")
            with _warnings() as told:
                step()
            torch.cuda.set_sync_debug_mode("default")
            found["waits"] = sum("synchronizing" in str(w.message) for w in told)
    else:
        last = step()
    found["losses"] = [*losses, float(last)]
    if profile:
        found["kernels"] = _profiled(step, setting)
    return found


def _warnings() -> Any:
    import warnings

    warnings.simplefilter("always")
    return warnings.catch_warnings(record=True)


def _profiled(step: Step, setting: Setting) -> list[tuple[str, float, int]]:
    from torch.profiler import ProfilerActivity, profile

    cuda = setting.device == "cuda"
    kind = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[kind]) as record:
        step()
        if cuda:
            torch.cuda.synchronize()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(record.key_averages(), key=lambda e: -getattr(e, key))
    return [(e.key[:80], round(getattr(e, key) / 1e3, 2), e.count) for e in events[:25]]


def in_a_process(work: Callable[..., Any], *args: Any, seconds: float) -> Any:
    """Return the result of a function in a forked process, or {"error": ...}."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        try:
            result = work(*args)
        except ImportError as error:
            result = {"error": f"not installed: {error.name}"}
        except Exception as error:  # of a row: the others go on
            result = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        theirs.send(result)

    process = context.Process(target=run)
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(max(1.0, seconds)) else {"error": "timed out"}
    except EOFError:
        return {"error": "the process died"}
    finally:
        process.kill()
        process.join()


# -- correctness -----------------------------------------------------------------------------------

SPECS: dict[str, Callable[[], Any]] = {
    "misa": lambda: passes.Misa(budget=0.3, period=2),
    "badam": lambda: passes.BAdam(period=2),
    "recompute": lambda: passes.Recompute(),
    "chunked_loss": lambda: passes.ChunkedLoss(),
    "compress": lambda: passes.Compress(),
    "rso": lambda: passes.Rso(rank=4, period=2),
    "velora": lambda: passes.Velora(groups=4),
    "mezo": lambda: passes.Mezo(),
    "sparse_mezo": lambda: passes.SparseMezo(),
    "lozo": lambda: passes.Lozo(),
    "subzero": lambda: passes.SubZero(rank=4),
    "lisa": lambda: passes.Lisa(layers=1, period=2),
}
MODES = ("float32", "bfloat16", "autocast")


def trained(family: str, name: str | None, mode: str, device: str, steps: int) -> list[float]:
    """Return the losses of a tiny model of a family."""
    from models import (  # pyright: ignore[reportMissingImports] # of tests/
        inputs_of,
        loss_of,
        make,
    )

    torch._dynamo.reset()
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    model = make(family).to(device, dtype).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    config = getattr(model, "config", None)
    for key in ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "dropout_rate"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    if name is not None:
        surgery.apply(model, SPECS[name]())
    forwards = name in ("mezo", "sparse_mezo", "lozo", "subzero")
    kind: Any = torch.optim.SGD if forwards else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=1e-4)
    losses = []
    for seed in range(steps):
        inputs = {k: v.to(device) for k, v in inputs_of(family, seed=seed).items()}
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        with torch.autocast(device, torch.bfloat16, enabled=mode == "autocast"):
            loss = loss_of(model, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def checked(family: str, setting: Setting) -> dict[str, Any]:
    """Return for each pass and mode how far losses are from eager's and from a CPU's."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    found: dict[str, Any] = {}
    for mode in MODES:
        first = trained(family, None, mode, setting.device, 1)[0]
        for name in SPECS:
            if family == "vit" and name == "chunked_loss":
                continue
            try:
                losses = trained(family, name, mode, setting.device, 6)
                entry: dict[str, Any] = {"off": abs(losses[0] - first) / abs(first)}
                if mode == "float32":
                    cpu = trained(family, name, mode, "cpu", 6)
                    entry["cpu"] = max(
                        abs(a - b) / abs(b) for a, b in zip(losses, cpu, strict=True)
                    )
            except Exception as error:
                entry = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
            found[f"{name} {mode}"] = entry
    return found


def correctness(setting: Setting, families: list[str], seconds: float) -> dict[str, Any]:
    """Run `checked` for all families, a process each."""
    context, end = multiprocessing.get_context("spawn"), time.time() + seconds
    with context.Pool(min(len(families), os.cpu_count() or 1)) as pool:
        jobs = {family: pool.apply_async(checked, (family, setting)) for family in families}
        found = {}
        for family, job in jobs.items():
            try:
                found[family] = job.get(max(1.0, end - time.time()))
            except multiprocessing.TimeoutError:
                found[family] = {"error": "timed out"}
        pool.terminate()
    return found


def _table(found: dict[str, Any]) -> None:
    for family, rows in found.items():
        wrong = {
            name: entry
            for name, entry in rows.items()
            if not isinstance(entry, dict)
            or "error" in entry
            or entry["off"] > (0.02 if any(w in name for w in ("zo", "zero")) else 1e-3)
            or entry.get("cpu", 0.0) > 0.02
        }
        print(f"{family}: {len(rows) - len(wrong)} of {len(rows)} hold", flush=True)
        for name, entry in wrong.items():
            print(f"    {name}: {entry}")


# -- the script ------------------------------------------------------------------------------------


def main(
    rows: Annotated[list[str] | None, typer.Argument(help="of the table; all by default")] = None,
    seconds: int = 480,
    part: Annotated[str, typer.Option(help="correctness, steps or tests; all by default")] = "",
    profile: Annotated[str, typer.Option(help="a row whose kernels are listed by time")] = "",
    device: str = "cuda",
    tiny: bool = False,
    out: Path = Path("benchmarks/results/gpu.json"),
) -> None:
    """Run the parts, and write what they found after each row."""
    setting, end = Setting(device, tiny), time.time() + seconds
    # In a process of its own: CUDA does not survive the forks of the rows.
    about = in_a_process(torch.cuda.get_device_name, seconds=60) if device == "cuda" else device
    found: dict[str, Any] = {
        "device": about,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }

    def write() -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_suffix(".tmp")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.replace(out)

    if part in ("", "steps"):
        found["steps"] = {}
        names = rows or list(ROWS)
        if profile and profile not in names:
            names.append(profile)
        for name in names:
            left = end - time.time() - (170 if not part else 10)
            if left < 0:
                found["steps"][name] = {"error": "no time"}
                continue
            row = in_a_process(measured, name, setting, name == profile, seconds=left)
            found["steps"][name] = row
            base = found["steps"].get("eager AdamW", {}).get("ms")
            ratio = f"{row['ms'] / base:.2f}x" if base and "ms" in row else ""
            peak = f"{row['peak'] / 2**30:.2f} GiB" if "peak" in row else ""
            print(f"{name:50} {peak:>10} {ratio:>7} {row.get('error', row.get('losses'))}")
            for kernel in row.get("kernels", ()):
                print("    ", *kernel)
            write()
            gc.collect()
    if part in ("", "correctness"):
        families = rows if part and rows else ["llama", "qwen2", "qwen3", "mistral", "phi3"]
        if not (part and rows):
            families += ["gemma3", "gpt2", "opt", "mixtral", "t5", "bert", "roberta", "vit"]
        found["correctness"] = correctness(setting, families, end - time.time() - 30)
        _table(found["correctness"])
        write()
    if part in ("", "tests"):
        run = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
        left = max(20.0, end - time.time())
        try:
            done = subprocess.run(run, capture_output=True, text=True, timeout=left)
            found["tests"] = done.stdout.strip().splitlines()[-1:]
        except subprocess.TimeoutExpired:
            found["tests"] = ["timed out"]
        print(*found["tests"])
        write()


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
