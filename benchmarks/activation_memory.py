"""Bytes alive after forward, peak bytes and time, ours beside what a user would pick instead.

    python -m benchmarks.activation_memory [words of the parts]

SmolLM2 (8 blocks, rows of 512 tokens), ViT-base (images) and BERT-base (rows of 128 tokens), in
float32 and bfloat16, the latter two with random weights. Every row runs the same batch in one
process, forward and backward; times are ratios to eager, alternating, the median of seven rounds.
(A CPU without bfloat16 products spends most of them on conversions: its ratios are its own, and
only SmolLM2's are taken.) Memory is the allocator's, weights left out; `live` is read while the
loss alone is held. Rows of ours are compared with what `surgery.report` says.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
import transformers
from peft import LoraConfig, VeloraConfig, get_peft_model
from torch._dynamo.backends.registry import lookup_backend
from transformers.utils import logging

import passes
import surgery
from benchmarks.common import alternate, ratio, run_parts
from benchmarks.plots import draw
from examples.real import kjv, smollm2, token_rows
from surgery import memory
from surgery.engine.finding import surgery_of
from surgery.weights.targets import blocks

CPU = torch.device("cpu")
GROUPS = 64
Build = Callable[[Any], Any]


def budget(share: float) -> Build:
    """PyTorch's own: torch.compile recomputes until this share of what it would save is left."""

    # A backend of its own for each: Dynamo would run the graph of another budget's model.
    def backend(graph: Any, inputs: Any) -> Any:
        with torch._functorch.config.patch(activation_memory_budget=share):
            return lookup_backend("aot_eager_decomp_partition")(graph, inputs)

    return lambda model: torch.compile(model, backend=backend)


def lora(**options: Any) -> Build:
    wide = options.pop("float32", True)

    def made(model: Any) -> Any:
        config = LoraConfig(r=16, target_modules="all-linear", **options)
        return get_peft_model(model, config, autocast_adapter_dtype=wide)

    return made


def lora_fa(model: Any) -> Any:
    model = lora(float32=False)(model)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


def ours(*chosen: Any, first: Build = lambda model: model) -> Build:
    return lambda model: surgery.apply(first(model), list(chosen))


def checkpointed(build: Build) -> Build:
    def made(model: Any) -> Any:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return build(model)

    return made


R, C, V = passes.Recompute(), passes.ChunkedLoss(), passes.Velora(groups=GROUPS)
EIGHT = passes.Compress()
MISA = passes.Misa(budget=0.03, period=1 << 30)
PEFT_VELORA = VeloraConfig(num_groups=GROUPS, init_type="batch_average_once")
EAGER = "eager"
ADAPTERS: dict[str, Build] = {
    "LoRA r=16 (peft)": lora(),
    "VeLoRA on LoRA (peft)": lora(float32=False, velora_config=PEFT_VELORA),
    "LoRA-FA (peft)": lora_fa,
}
LANGUAGE = ADAPTERS | {
    "velora on LoRA": ours(V, first=lora(float32=False)),
    "velora + recompute on LoRA": ours(V, R, first=lora(float32=False)),
    "velora + recompute + chunked_loss on LoRA": ours(V, R, C, first=lora(float32=False)),
    "recompute": ours(R),
    "recompute + chunked_loss": ours(R, C),
    "recompute + chunked_loss + velora": ours(R, C, V),
    "recompute + chunked_loss + compress 8": ours(R, C, EIGHT),
    "recompute + chunked_loss + velora + compress 8": ours(R, C, V, EIGHT),
    "misa 3 % + recompute + chunked_loss + compress 8": ours(MISA, R, C, EIGHT),
}
CLASSIFIERS = ADAPTERS | {
    "recompute": ours(R),
    "recompute + velora": ours(R, V),
    "recompute + compress 8": ours(R, EIGHT),
    "misa 3 % + recompute + compress 8": ours(MISA, R, EIGHT),
}


OURS = {name: build for name, build in LANGUAGE.items() if "LoRA" not in name}
HALF = {"LoRA r=16, bfloat16 adapters": lora(float32=False)}


def all_rows(rows: dict[str, Build]) -> dict[str, Build]:
    """The rows, each inside checkpointing too, and what needs no library of ours."""
    inside = {f"{name}, checkpointing": checkpointed(build) for name, build in rows.items()}
    return {
        EAGER: lambda model: model,
        "checkpointing": checkpointed(lambda model: model),
        "memory budget 0.5 (aot_eager)": budget(0.5),
        "memory budget 0.3 (aot_eager)": budget(0.3),
        **rows,
        **inside,
    }


def smollm2_case(dtype: torch.dtype, rows: int = 1) -> tuple[Any, dict[str, Any]]:
    model, tokenizer = smollm2(layers=8)
    ids = token_rows(kjv(), tokenizer, 512, rows)
    return model.train().to(dtype), {"input_ids": ids, "labels": ids}


def vit_case(dtype: torch.dtype, images: int) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    config = transformers.ViTConfig(problem_type="single_label_classification")
    pixels = torch.randn(images, 3, 224, 224).to(dtype)
    batch = {"pixel_values": pixels, "labels": torch.arange(images) % 2}
    model: Any = transformers.ViTForImageClassification(config).train()
    return model.to(dtype), batch


def bert_case(dtype: torch.dtype, rows: int) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        problem_type="single_label_classification",
        # With dropout, torch's CPU attention takes its mathematical form, which CUDA's does not.
        attention_probs_dropout_prob=0.0,
    )
    batch = {"input_ids": torch.randint(5, 30_000, (rows, 128)), "labels": torch.arange(rows) % 2}
    model: Any = transformers.BertForSequenceClassification(config).train()
    return model.to(dtype), batch


def compare(
    start: Any, batch: dict[str, Any], builds: dict[str, Build], timed: int
) -> dict[str, dict[str, Any]]:
    """Measure every row, `timed` rounds of them."""
    torch._dynamo.reset()
    bases = {name: copy.deepcopy(start) for name in builds}
    models = {name: build(bases[name]) for name, build in builds.items()}

    def stepper(name: str) -> Callable[[], float]:
        def step() -> float:
            bases[name].zero_grad()  # gradients count: they are made anew in every step
            torch.manual_seed(0)
            loss = models[name](**batch).loss
            loss.backward()
            return loss.item()

        return step

    steps = {name: stepper(name) for name in builds}
    losses = {name: step() for name, step in steps.items()}  # captures
    seconds = alternate(steps, times=timed, warm_up=0) if timed else {}
    rows: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        bases[name].zero_grad()
        forward = memory.measure(lambda model=model: model(**batch).loss, CPU)
        backward = memory.measure(forward.result.backward, CPU, after=forward)
        peak = max(forward.peak, forward.live + backward.peak)
        row: dict[str, Any] = {"live_megabytes": round(forward.live / 1e6, 2)}
        row["peak_megabytes"] = round(peak / 1e6, 2)
        row["loss"] = losses[name]
        if timed:
            row["time_over_eager"] = round(ratio(seconds, name, EAGER), 3)
            row["milliseconds"] = round(1e3 * statistics.median(seconds[name]), 1)
        if isinstance(model, torch.nn.Module) and surgery_of(model) is not None:
            found = surgery.report(model, batch)
            kept = sum(one.bytes for one in found.kept)
            assert found.after.activations is not None
            row["report_over_live"] = round(found.after.activations / forward.live, 5)
            row["accounted_over_live"] = round(kept / forward.live, 5)
        rows[name] = row
        print(f"{name:55} {row}", flush=True)
    for row in rows.values():
        for key in ("live", "peak"):
            own, eager = row[f"{key}_megabytes"], rows[EAGER][f"{key}_megabytes"]
            row[f"{key}_over_eager"] = round(own / eager, 3)
    return rows


# -- training steps: velora beside training the same weights fully, and beside peft's --------------


def training_steps(
    start: Any, batch: dict[str, Any], only: int | None = None, times: int = 9
) -> dict[str, dict[str, Any]]:
    """Whole steps with AdamW, on the Linears of all blocks, and on the same adapters."""
    inside = {name for own in blocks(start).values() for name in own}
    for name, parameter in start.named_parameters():
        parameter.requires_grad_(name in inside and parameter.ndim == 2)
    builds: dict[str, Build] = {
        "all block Linears": lambda model: model,
        "velora": ours(V),
        "VeLoRA on LoRA (peft)": lora(velora_config=PEFT_VELORA),
        "velora on LoRA": ours(V, first=lora()),
        "velora + recompute on LoRA": ours(V, R, first=lora()),
        "velora + recompute + chunked_loss on LoRA": ours(V, R, C, first=lora()),
    }
    builds = dict(list(builds.items())[:only])
    torch._dynamo.reset()
    models = {name: build(copy.deepcopy(start)) for name, build in builds.items()}
    optimizers = {
        name: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-5)
        for name, m in models.items()
    }

    def stepper(name: str) -> Callable[[], None]:
        def step() -> None:
            models[name](**batch).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()

        return step

    seconds = alternate({name: stepper(name) for name in builds}, times=times, warm_up=2)
    rows: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        forward = memory.measure(lambda model=model: model(**batch).loss, CPU)
        forward.result.backward()
        gradients = memory.storage_bytes(p.grad for p in model.parameters() if p.grad is not None)
        full = "VeLoRA on LoRA (peft)" if "LoRA" in name else "all block Linears"
        rows[name] = {
            "live_megabytes": round(forward.live / 1e6, 2),
            "gradient_bytes": gradients,
            "optimizer_bytes": memory.state_bytes(optimizers[name]),
            "milliseconds": round(1e3 * statistics.median(seconds[name]), 1),
            "compared_with": full,
            "time_ratio": round(ratio(seconds, name, full), 3),
        }
        model.zero_grad()
        print(f"{name:55} {rows[name]}", flush=True)
    return rows


# -- head and loss alone ---------------------------------------------------------------------------


class Head(torch.nn.Module):
    """An output head of SmolLM2's size and its loss, for 2,048 tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(576, 49_152, bias=False)

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.head(hidden), targets)


def head_and_loss() -> dict[str, dict[str, Any]]:
    hidden, targets = torch.randn(2048, 576), torch.randint(0, 49_152, (2048,))
    models = {"eager": Head(), "chunked_loss": surgery.apply(Head(), C)}

    def stepper(name: str) -> Callable[[], None]:
        def step() -> None:
            models[name].zero_grad()
            models[name](hidden.detach().requires_grad_(), targets).backward()

        return step

    steps = {name: stepper(name) for name in models}
    seconds = alternate(steps, times=9, warm_up=2)
    rows: dict[str, dict[str, Any]] = {}
    for name in models:
        models[name].zero_grad()
        peak = memory.measure(steps[name], CPU).peak
        time = round(ratio(seconds, name, "eager"), 3)
        rows[name] = {"peak_megabytes": round(peak / 1e6, 1), "time_over_eager": time}
        print(f"{name:55} {rows[name]}", flush=True)
    return rows


# -- quality of packed activations -----------------------------------------------------------------


def quality(steps: int = 100, seeds: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    """Held-out loss of SmolLM2 (8 blocks) after AdamW, exact and with packed activations."""
    start, tokenizer = smollm2(layers=8)
    start.train()
    tokens = token_rows(kjv(), tokenizer, 64, 4 * steps * len(seeds) + 64)
    test, rest = tokens[:64], tokens[64:]
    builds = {
        "exact": lambda model: model,
        "compress 8": ours(R, C, EIGHT),
    }
    losses: dict[str, list[float]] = {name: [] for name in builds}
    for seed in seeds:
        order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
        for name, build in builds.items():
            torch._dynamo.reset()
            model = build(copy.deepcopy(start))
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
            for ids in rest[order].split(4)[:steps]:
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                parts = [model(input_ids=ids, labels=ids).loss.item() for ids in test.split(8)]
            losses[name].append(round(statistics.fmean(parts), 4))
        print(losses, flush=True)
    means = {name: round(statistics.fmean(own), 4) for name, own in losses.items()}
    return {"steps": steps, "batch": [4, 64], "held_out_losses": losses, "held_out_mean": means}


def exact(start: Any, batch: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The exact passes alone, over more rounds: their bar is within the noise of this machine."""
    builds = {EAGER: lambda model: model, "recompute": ours(R), "both": ours(R, C)}
    return compare(start, batch, builds, timed=21)


def budgets(start: Any, batch: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """PyTorch's own recomputation beside ours."""
    shares = {f"memory budget {share} (aot_eager)": budget(share) for share in (0.5, 0.3)}
    builds = {EAGER: lambda model: model, **shares, "recompute + chunked_loss": ours(R, C)}
    return compare(start, batch, builds, timed=9)


def velora_steps(start: Any, batch: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The first two of `training_steps`, over more rounds."""
    return training_steps(start, batch, only=2, times=21)


PARTS: dict[str, Callable[[], Any]] = {
    "head_and_loss": head_and_loss,
    "training_steps": lambda: training_steps(*smollm2_case(torch.float32)),
    "velora, steps": lambda: velora_steps(*smollm2_case(torch.float32)),
    "budgets, SmolLM2, 8 blocks, 1 x 512, float32": lambda: budgets(*smollm2_case(torch.float32)),
    "exact, SmolLM2, 8 blocks, 1 x 512, float32": lambda: exact(*smollm2_case(torch.float32)),
    "exact, SmolLM2, 8 blocks, 2 x 512, float32": lambda: exact(*smollm2_case(torch.float32, 2)),
    "SmolLM2, 8 blocks, 1 x 512, float32": lambda: compare(
        *smollm2_case(torch.float32), all_rows(LANGUAGE), timed=7
    ),
    "ViT-base, 2 images, float32": lambda: compare(
        *vit_case(torch.float32, 2), all_rows(CLASSIFIERS), timed=7
    ),
    "BERT-base, 2 x 128, float32": lambda: compare(
        *bert_case(torch.float32, 2), all_rows(CLASSIFIERS), timed=7
    ),
    "SmolLM2, 8 blocks, 1 x 512, bfloat16": lambda: compare(
        *smollm2_case(torch.bfloat16), all_rows(LANGUAGE | HALF), timed=7
    ),
    "ViT-base, 2 images, bfloat16": lambda: compare(
        *vit_case(torch.bfloat16, 2), all_rows(CLASSIFIERS | HALF), timed=0
    ),
    "BERT-base, 2 x 128, bfloat16": lambda: compare(
        *bert_case(torch.bfloat16, 2), all_rows(CLASSIFIERS | HALF), timed=0
    ),
    "SmolLM2, 8 blocks, 4 x 512, bfloat16": lambda: compare(
        *smollm2_case(torch.bfloat16, rows=4), {EAGER: lambda model: model} | OURS, timed=0
    ),
    "quality": quality,
}


def main(parts: list[str]) -> None:
    """Run the parts whose names contain one of the words given (default: all)."""
    logging.set_verbosity_error()
    torch._dynamo.config.cache_size_limit = 64
    result = run_parts("activation_memory", PARTS, parts, groups=GROUPS)
    draw(result)


if __name__ == "__main__":
    main(sys.argv[1:])
