"""What the benchmarks share: alternating timing, peak bytes, results with versions and machine."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from importlib.metadata import distributions, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.optim.lr_scheduler import LambdaLR

from surgery import memory

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    wanted = ["torch", "transformers", "peft", "badam", "numpy"]
    packages = [d.metadata["Name"] for d in distributions() if d.metadata["Name"] in wanted]
    cpu = platform.processor() or platform.machine()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def save(name: str, result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}.json"
    partial = target.with_suffix(".tmp")
    about = {} if "machines" in result else {"machine": machine()}
    partial.write_text(json.dumps(about | result, indent=1) + "\n")
    partial.replace(target)
    print(f"wrote {target.relative_to(Path.cwd())}")


def load(name: str) -> dict[str, Any]:
    """Return the results saved under a name, empty if there are none."""
    source = RESULTS / f"{name}.json"
    return json.loads(source.read_text()) if source.exists() else {}


Job: TypeAlias = tuple[Any, ...]


class OutOfTime(Exception):
    """Jobs are left that would not end in time; what is done is kept."""


def train_all(
    runs: str, train: Callable[..., Any], jobs: Sequence[Job], until: float = math.inf
) -> dict[Job, Any]:
    """Train all, in processes side by side; what an earlier call did is kept.

    runs: name of the file that keeps them; delete it to train everything again. As many at a time
    as WORKERS says (default: 2). until: by `time.time()`; no job is begun that, by the longest so
    far, would end later, and `OutOfTime` is raised if there are such.
    """
    keys = {job: " | ".join(map(str, job)) for job in jobs}
    before = load(runs)
    known: dict[str, Any] = before.get("losses", {})
    here = machine()
    others = [each for each in before.get("machines", []) if each != here]
    missing = [job for job in dict.fromkeys(jobs) if keys[job] not in known]
    workers = int(os.environ.get("WORKERS", "2"))
    begun: dict[Future[Any], tuple[Job, float]] = {}
    longest = 0.0
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        while begun or (missing and time.time() + longest < until):
            while missing and len(begun) < workers and time.time() + longest < until:
                job = missing.pop(0)
                begun[pool.submit(train, *job)] = job, time.time()
            for done in wait(begun, return_when=FIRST_COMPLETED).done:
                job, start = begun.pop(done)
                longest = max(longest, time.time() - start)
                known[keys[job]] = done.result()
                save(runs, {"machines": [*others, here], "losses": known})
                print(keys[job], known[keys[job]], flush=True)
    if missing:
        raise OutOfTime(f"{len(missing)} of {len(jobs)} runs are left")
    return {job: known[keys[job]] for job in jobs}


def run_parts(
    name: str, parts: dict[str, Callable[[], Any]], words: Sequence[str], **setting: Any
) -> dict[str, Any]:
    """Run the parts whose names contain one of the words (default: all), and save each when it is
    done beside those that were saved before; return them all."""
    before = load(name)
    result, machines = before.get("parts", {}), before.get("machines", {})
    for part, run in parts.items():
        if not words or any(word in part for word in words):
            result[part], machines[part] = run(), machine()
            done = [each for each in parts if each in result]
            where = {each: machines[each] for each in done}
            save(name, setting | {"machines": where, "parts": {p: result[p] for p in done}})
    return result


def chosen(
    runs: str,
    train: Callable[..., Any],
    tried: Mapping[str, Mapping[float, Job]],
    score: Callable[[Any], float],
    until: float = math.inf,
) -> tuple[dict[Job, Any], dict[str, float]]:
    """Train each method at its learning rates; return what each job gave, and the best rates.

    tried: method -> rate -> job. score: of what a job gives; the smallest is the best.
    """
    jobs = [job for rates in tried.values() for job in rates.values()]
    found = train_all(runs, train, jobs, until)
    best = {
        m: min(rates, key=lambda lr, rates=rates: score(found[rates[lr]]))
        for m, rates in tried.items()
    }
    return found, best


def summary(losses: Sequence[float]) -> dict[str, Any]:
    return {
        "held_out_losses": [round(loss, 4) for loss in losses],
        "held_out_mean": round(statistics.fmean(losses), 4),
    }


def interval(values: Sequence[float]) -> list[float]:
    """Return the interval that holds the mean with 95 %, by Student's t of three values."""
    assert len(values) == 3
    half = 4.303 * statistics.stdev(values) / 3**0.5
    mean = statistics.fmean(values)
    return [round(mean - half, 4), round(mean + half, 4)]


def warmed_cosine(optimizer: torch.optim.Optimizer, steps: int, warm_up: int) -> LambdaLR:
    """Return a schedule: a linear warm-up, and a cosine over all steps down to a tenth."""

    def factor(n: int) -> float:
        return min((n + 1) / warm_up, 1) * (0.55 + 0.45 * math.cos(math.pi * min(n / steps, 1)))

    return LambdaLR(optimizer, factor)


def step_of(model: Any, optimizer: Any, batches: Sequence[torch.Tensor]) -> Callable[[], None]:
    """Return a plain training step on the next of the batches, from the first again at the end."""
    turn = itertools.cycle(batches)

    def step() -> None:
        ids = next(turn)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def adapted(model: Any, rank: int, four_bits: bool = False) -> Any:
    """Put LoRA on every Linear of a language model, on the meta device too.

    four_bits: the weights of its blocks are nf4 first, their scales in eight bits (QLoRA).
    """
    from peft import LoraConfig, get_peft_model

    if four_bits:
        _in_four_bits(model.model.layers)
    config = LoraConfig(r=rank, target_modules="all-linear")
    with torch.device(memory.device_of(model)):
        return get_peft_model(model, config).train()


def _in_four_bits(blocks: torch.nn.Module) -> None:
    from bitsandbytes import functional
    from bitsandbytes import nn as bits

    few: Any = bits
    with torch.device("cpu"):  # else a global table would be of the first weight's device
        functional.quantize_4bit(torch.ones(64, 64), compress_statistics=True)
    for owner in list(blocks.modules()):
        for name, linear in list(owner.named_children()):
            if not isinstance(linear, torch.nn.Linear):
                continue
            size = linear.in_features, linear.out_features
            made: Any = few.Linear4bit(*size, bias=False, quant_type="nf4", device="meta")
            weight: Any = few.Params4bit(linear.weight.data, quant_type="nf4", module=made)
            made.weight = weight._quantize(linear.weight.device)
            setattr(owner, name, made)


@torch.no_grad()
def held_out(model: Any, rows: torch.Tensor, at_a_time: int) -> float:
    """Return the mean loss of rows of tokens, in evaluation mode."""
    model.eval()
    losses = [model(input_ids=ids, labels=ids).loss.item() for ids in rows.split(at_a_time)]
    model.train()
    return statistics.fmean(losses)


def alternate(
    steps: dict[str, Callable[[], Any]], times: int = 9, warm_up: int = 3
) -> dict[str, list[float]]:
    """Time each callable in turn, `times` rounds of all of them; seconds."""
    for step in steps.values():
        for _ in range(warm_up):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(times):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, to: str) -> float:
    """Return the median over rounds of time(name) / time(to)."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))


def clock_of(device: str) -> Callable[[], float]:
    """Return the clock for steps, in seconds. On a CPU, where runs side by side share the cores, it
    is the processor's, and this process gets one thread."""
    if device == "cuda":
        return time.perf_counter
    torch.set_num_threads(1)
    return time.process_time


def standing_and_peak(begin: Callable[[], Callable[[], Any]]) -> tuple[int, int]:
    """Return the bytes that stand on a CPU once a run has begun, and the peak in its next step.

    begin: makes all that there is, and returns the step.
    """
    begun = memory.measure(begin, torch.device("cpu"))
    more = memory.measure(begun.result, torch.device("cpu"), after=begun).peak
    return begun.live, begun.live + more


def peak_of_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], Any]
) -> int:
    """Return the peak bytes of training: weights, optimizer state, and what a step adds on top."""
    step()
    standing = memory.storage_bytes(model.parameters()) + memory.state_bytes(optimizer)
    return standing + memory.measure(step, memory.device_of(model)).peak
