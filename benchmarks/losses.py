"""Head and loss where the logits are largest: peak and time beside eager, torch's and TRL's chunks.

python -m benchmarks.losses [peaks | times]

Vocabularies of Llama-3 (128,256) and Gemma-3 (262,144). Peaks: 4,096 tokens, one forward and
backward, by the allocator, without hidden states and weights, which are there before; of the larger
heads in bfloat16. Times: 512 tokens, alternating, of the smallest head; without
`linear_cross_entropy`, which takes ten times as long on a CPU. "frozen": only hidden states get a
gradient, as under LoRA and MISA's defaults. What is in the results already is not measured again.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import trl.trainer.utils
from torch import Tensor
from torch.nn import functional
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from benchmarks.common import alternate, load, ratio, save
from surgery.logits.factored import factored
from surgery.memory import measure

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = [(128_256, 1024), (128_256, 2048), (262_144, 1024), (262_144, 2048)]
SETTINGS = [  # size, dtype, whether the head is frozen; the first three are timed, too
    (SIZES[0], "float32", False),
    (SIZES[0], "float32", True),
    (SIZES[0], "bfloat16", False),
    *((size, "bfloat16", False) for size in SIZES[1:]),
]
PEAK_TOKENS, TIMED_TOKENS, TIMES = 4096, 512, 7


@dataclass(eq=False, kw_only=True)
class Case:
    """What a loss is computed of. hidden: (tokens, D). weight: (V, D)."""

    hidden: Tensor
    weight: Tensor
    teacher: Tensor
    teacher_weight: Tensor
    labels: Tensor
    few: Tensor  # with 70 % ignored


def case(vocabulary: int, width: int, tokens: int, dtype: torch.dtype, frozen: bool) -> Case:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) / width**0.5).to(dtype)

    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    off = torch.rand(tokens, generator=generator) < 0.7
    return Case(
        hidden=(draw(tokens, width) * width**0.5).requires_grad_(),
        weight=draw(vocabulary, width).requires_grad_(not frozen),
        teacher=draw(tokens, width // 2),
        teacher_weight=draw(vocabulary, width // 2),
        labels=labels,
        few=labels.masked_fill(off, -100),
    )


Head = Callable[[Tensor, Tensor], Tensor]
PerToken = Callable[[Head, Case], Tensor]


def cross_entropy(head: Head, c: Case) -> Tensor:
    return functional.cross_entropy(head(c.hidden, c.weight).float(), c.labels)


def mostly_ignored(head: Head, c: Case) -> Tensor:
    return functional.cross_entropy(head(c.hidden, c.weight).float(), c.few)


def per_token(head: Head, c: Case) -> Tensor:
    log_p = functional.log_softmax(head(c.hidden, c.weight).float(), -1)
    return log_p.gather(-1, c.labels[:, None]).squeeze(-1)


def log_probabilities(head: Head, c: Case, per_token: PerToken = per_token) -> Tensor:
    return (per_token(head, c) * torch.linspace(-1, 1, len(c.labels))).mean()


def dpo(head: Head, c: Case, per_token: PerToken = per_token) -> Tensor:
    chosen, rejected = per_token(head, c).view(2, -1).sum(-1)
    return -functional.logsigmoid(0.1 * (chosen - rejected))


def distillation(head: Head, c: Case) -> Tensor:
    with torch.no_grad():
        teacher = functional.softmax(head(c.teacher, c.teacher_weight).float() / 2, -1)
    student = functional.log_softmax(head(c.hidden, c.weight).float() / 2, -1)
    return functional.kl_div(student, teacher, reduction="batchmean")


LOSSES = {
    "cross entropy": cross_entropy,
    "cross entropy, 70 % ignored": mostly_ignored,
    "per-token log-probabilities": log_probabilities,
    "DPO pair": dpo,
    "KL distillation": distillation,
}
LARGE = ("cross entropy", "per-token log-probabilities")  # of the larger heads, too
HEADS: dict[str, Head] = {"eager": functional.linear, "chunked_loss": factored}


def in_torch(c: Case) -> Tensor:
    fused: Any = functional.linear_cross_entropy
    options: Any = torch.nn.LinearCrossEntropyOptions()
    return fused(c.hidden, c.weight, c.labels, ignore_index=-100, options=options)


def per_token_of_trl(head: Head, c: Case) -> Tensor:
    own: Any = ChunkedLogProbFunction.apply
    chunk = trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
    return own(c.hidden, c.weight, None, c.labels, 1.0, chunk, None, 1.0, ())[0]


def distillation_of_trl(c: Case) -> Tensor:
    own: Any = ChunkedDivergenceFunction.apply
    given = (c.hidden, c.weight, None, c.teacher, c.teacher_weight, None)
    return own(*given, 0.0, 2.0)[0].mean()


def ways(name: str, c: Case, timed: bool) -> dict[str, Callable[[Case], Tensor]]:
    """Return what a loss is computed by."""
    found: dict[str, Callable[[Case], Tensor]] = {
        way: partial(LOSSES[name], head) for way, head in HEADS.items()
    }
    vocabulary, width = c.weight.shape
    smallest = (vocabulary, width) == SIZES[0] and c.hidden.dtype == torch.float32
    if name == "cross entropy" and hasattr(functional, "linear_cross_entropy"):
        if smallest and not timed:
            found["linear_cross_entropy"] = in_torch
        if not c.weight.requires_grad:
            found["chunked_loss, tokens=32"] = partial(cross_entropy, partial(factored, tokens=32))
    if (vocabulary, width) != SIZES[0]:
        return found
    if name == "per-token log-probabilities":
        found["TRL"] = partial(log_probabilities, functional.linear, per_token=per_token_of_trl)
    if name == "DPO pair":
        found["TRL"] = partial(dpo, functional.linear, per_token=per_token_of_trl)
    if name == "KL distillation":
        found["TRL"] = distillation_of_trl
    return found


def step(loss: Callable[[Case], Tensor], c: Case) -> None:
    c.hidden.grad = c.weight.grad = None
    loss(c).backward()


def settings(timed: bool) -> Iterator[tuple[str, str, Case]]:
    """Return what is measured: its key, the loss and what it is computed of."""
    for (vocabulary, width), dtype, frozen in SETTINGS[: 3 if timed else None]:
        for name in LOSSES:
            # A pair is two sums of log-probabilities, and a student is trained.
            twice = name == "DPO pair" and (dtype, frozen) != ("float32", False)
            if twice or (name == "KL distillation" and frozen):
                continue
            if (vocabulary, width) != SIZES[0] and name not in LARGE:
                continue
            key = f"{vocabulary} x {width}, {dtype}{', frozen head' * frozen} | {name}"
            tokens = TIMED_TOKENS if timed else PEAK_TOKENS
            yield key, name, case(vocabulary, width, tokens, DTYPES[dtype], frozen)


def peaks(result: dict[str, Any]) -> None:
    """How much a step takes at most, beside what is there before."""
    for key, name, c in settings(timed=False):
        found = result.setdefault(key, {})
        for way, loss in ways(name, c, timed=False).items():
            if way not in found:
                c.hidden.grad = c.weight.grad = None
                found[way] = measure(partial(step, loss, c), CPU).peak
        print(key, {way: f"{peak / 1e6:,.0f} MB" for way, peak in found.items()}, flush=True)
        save("losses", load("losses") | {"peaks": result})


def times(result: dict[str, Any]) -> None:
    """How long a step takes."""
    for key, name, c in settings(timed=True):
        if key in result:
            continue
        calls = {way: partial(step, loss, c) for way, loss in ways(name, c, timed=True).items()}
        seconds = alternate(calls, TIMES, warm_up=1)
        result[key] = {
            way: {
                "milliseconds": round(1e3 * statistics.median(each), 1),
                "ratio": round(ratio(seconds, way, "eager"), 3),
            }
            for way, each in seconds.items()
        }
        print(key, {w: r["ratio"] for w, r in result[key].items()}, flush=True)
        save("losses", load("losses") | {"times": result})


def main() -> None:
    parts = sys.argv[1:] or ["peaks", "times"]
    for part in parts:
        {"peaks": peaks, "times": times}[part](load("losses").get(part, {}))


if __name__ == "__main__":
    main()
