"""What plan says of a step's peak, beside the allocator of a real run."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from laws import PASSES
from models import adapt, batch, build, make
from torch import nn
from torch.optim import SGD, AdamW

import passes
import surgery
from surgery.engine.captures import CAPTURES
from surgery.engine.clock import LISTENING
from surgery.kernels import directions
from surgery.memory import loss_of, measure
from surgery.prediction.devices import device_named
from surgery.prediction.loop import Loop, foresee
from surgery.zeroth_order import direction

CPU = torch.device("cpu")
BF16 = torch.bfloat16
EXACT = [passes.Recompute(), passes.ChunkedLoss()]


@dataclass(frozen=True, kw_only=True)
class Case:
    spec: Any
    family: str = "llama"
    dtype: torch.dtype = torch.float32
    change: Callable[[Any], Any] = lambda model: model
    options: dict[str, Any] = field(default_factory=dict)  # of plan: of the loop
    inputs: dict[str, torch.Tensor] | None = None

    def model(self) -> nn.Module:
        return self.change(build(self.family).to(self.dtype))

    def batch(self) -> dict[str, torch.Tensor]:
        made = self.inputs or batch(self.family, rows=2, length=32)
        return {
            k: v.to(self.dtype) if v.is_floating_point() else v.clone() for k, v in made.items()
        }


def checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def torchao(kind: str) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda trained: getattr(pytest.importorskip("torchao.optim"), kind)(trained)


def wide(model: Any) -> Any:
    return build("llama", hidden_size=128, intermediate_size=256)


CASES = {  # each costs a capture, and one more beside real tensors
    "misa": Case(spec=passes.Misa(budget=0.5)),
    "exact ones, clipped": Case(spec=EXACT, options={"clip": 1.0}),
    "velora, autocast": Case(spec=passes.Velora(groups=4), options={"autocast": BF16}),
    "rso, fused AdamW": Case(
        spec=passes.Rso(rank=4), options={"optimizer": partial(AdamW, fused=True)}
    ),
    "galore and both": Case(spec=[passes.Galore(rank=4), *EXACT]),
    "badam, bfloat16, foreach": Case(
        spec=passes.BAdam(), dtype=BF16, options={"optimizer": partial(AdamW, foreach=True)}
    ),
    "NAdam, which reads its state": Case(
        spec=passes.Recompute(), change=wide, options={"optimizer": torch.optim.NAdam}
    ),
    "8 bits, in a compiled step": Case(
        spec=passes.Recompute(), change=wide, options={"optimizer": torchao("AdamWFp8")}
    ),
    "mezo, SGD": Case(spec=passes.Mezo(), options={"optimizer": partial(SGD, lr=1e-3)}),
    "checkpointing": Case(spec=passes.Misa(budget=0.5), change=checkpointed),
    "LoRA": Case(spec=passes.Recompute(), change=lambda model: adapt(model, "on every Linear")),
    "GPT-2, dropout": Case(spec=passes.Recompute(), family="gpt2"),
    "BERT": Case(spec=passes.Misa(budget=0.5), family="bert"),
    "ViT": Case(spec=passes.Compress(), family="vit"),
    "Mixtral": Case(spec=passes.Recompute(), family="mixtral"),
}


def really(case: Case, spec: Any) -> tuple[int, str]:
    """Train two steps; return the peak of the second, from before there was a model, and where."""
    held: list[Any] = []

    def forward() -> Any:
        dtype = case.options.get("autocast")
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
            return loss_of(held[0](**held[1]))

    def backward(loss: list[Any]) -> None:
        loss.pop().backward()

    def step() -> None:
        if "clip" in case.options:
            nn.utils.clip_grad_norm_(held[0].parameters(), case.options["clip"])
        held[2].step()
        held[2].zero_grad()

    def begin() -> None:
        held.extend([case.model(), case.batch()])
        if spec is not None:
            surgery.apply(held[0], spec, compile=False)
        make = case.options.get("optimizer", AdamW)
        held.append(make([p for p in held[0].parameters() if p.requires_grad]))
        backward([forward()])
        step()
        gc.collect()

    gc.collect()  # what is freed meanwhile would count
    found = measure(begin, CPU)
    live = found.live
    peaks = {}
    loss: list[Any] = []
    for phase, call in (
        ("forward", lambda: loss.append(forward())),
        ("backward", lambda: backward(loss)),
        ("step", step),
    ):
        found = measure(call, CPU, after=found)
        peaks[phase] = live + found.peak
        live += found.live
    phase = max(peaks, key=lambda each: peaks[each])
    return peaks[phase], phase


@pytest.mark.parametrize("name", CASES)
def test_the_peak_is_the_allocators(name):
    case = CASES[name]
    planned = surgery.plan(case.model(), case.batch(), case.spec, compile=False, **case.options)
    for side, spec in ((planned.before, None), (planned.after, case.spec)):
        peak, phase = really(case, spec)
        assert side.peak == pytest.approx(peak, rel=0.03), spec
        assert side.phase == phase
    assert sum(holder.bytes for holder in planned.holders) == planned.after.peak


@pytest.mark.parametrize("padding", ["right", "none"])
def test_a_mask_is_kept_only_if_it_hides_something(padding):
    """With one, attention repeats its keys and values for each query's head."""
    inputs = batch("llama", rows=2, length=128, padding=padding)
    change = partial(make, "llama", num_attention_heads=8, num_key_value_heads=1)
    case = Case(spec=None, change=lambda _: change())
    planned = surgery.plan(case.model(), inputs, passes.Recompute(), compile=False)
    peak, _ = really(replace(case, inputs=inputs), None)
    assert planned.before.peak == pytest.approx(peak, rel=0.005)
    whole = surgery.plan(case.model(), (2, 128), passes.Recompute(), compile=False)
    same = planned.before.activations == pytest.approx(whole.before.activations, rel=0.01)
    assert same == (padding == "none")


def test_what_a_step_compiles_is_put_back():
    compile = torch.compile
    surgery.plan(build("llama"), batch("llama"), "recompute", optimizer=torch.optim.Adagrad)
    assert torch.compile is compile


def test_holders_are_named_by_module_and_operation():
    found = surgery.plan(build("llama"), batch("llama", length=32), "recompute")
    by_kind: dict[str, int] = {}
    for each in found.holders:
        by_kind[each.kind] = by_kind.get(each.kind, 0) + each.bytes
    assert by_kind["weights"] == found.after.parameters + sum(
        b.numel() * b.element_size() for b in build("llama").buffers()
    )
    own = [each for each in found.holders if each.kind in ("activations", "temporaries")]
    assert any(each.where.startswith("model.layers.*.") for each in own)
    assert all(each.made_by for each in own)
    assert "What is alive at the peak, the largest first" in str(found)


@pytest.mark.parametrize("spec", [PASSES["misa"], PASSES["mezo"]])
def test_a_plan_leaves_no_trace(spec, no_captures):
    model, inputs = build("gpt2"), batch("gpt2")
    model.transformer.wte.weight.requires_grad_(False)
    flags = [(p, p.requires_grad, p.grad, p._version) for p in model.parameters()]
    hooks = [
        (dict(m._forward_hooks), dict(m._forward_pre_hooks), sorted(m.__dict__))
        for m in model.modules()
    ]
    generator, listening, grad = torch.get_rng_state(), len(LISTENING), torch.is_grad_enabled()
    surgery.plan(model, inputs, spec())
    for parameter, required, gradient, version in flags:
        assert (parameter.requires_grad, parameter.grad) == (required, gradient)
        assert parameter._version == version
    assert hooks == [
        (dict(m._forward_hooks), dict(m._forward_pre_hooks), sorted(m.__dict__))
        for m in model.modules()
    ]
    assert torch.equal(torch.get_rng_state(), generator)
    assert (len(LISTENING), torch.is_grad_enabled()) == (listening, grad)
    gc.collect()
    assert len(CAPTURES) == 0  # they go with the models that they serve


@pytest.mark.parametrize("name", ["mezo", "lozo", "subzero"])
def test_what_a_process_keeps_is_real_after_a_plan(name):
    """A table of quantiles without memory once served the real steps that came later."""
    directions._quantiles.cache_clear()
    direction._number.cache_clear()
    options = {"optimizer": partial(SGD, lr=1e-3)}
    model, tokens = make("plain"), torch.zeros(2, 6, dtype=torch.long)
    surgery.plan(
        model, {"tokens": tokens}, name, loss=lambda m, b: m(b["tokens"], b["tokens"]), **options
    )
    surgery.apply(model, name)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    loss = model(tokens, tokens)
    loss.backward()
    optimizer.step()
    assert type(loss.detach()) is torch.Tensor
    surgery.remove(model)
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=False))


class Picks(nn.Module):
    """How many entries it computes with depends on what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.blocks[0](x)
        return y[y > 0].sum()


def test_a_forward_that_depends_on_data_is_named_and_the_rest_is_there():
    found = surgery.plan(Picks(), {"x": torch.ones(2, 4)}, "recompute")
    lines = [text for label, text in found.lines if label == "peak not predicted"]
    assert len(lines) == 2 and "without the passes" in lines[0] and "with the passes" in lines[1]
    assert found.after.peak is None and found.after.parameters == 80 and not found.holders


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "h1000"}, r"device='h1000' is not known\. Did you mean"),
        ({"batch": (0, 8)}, "neither keyword arguments"),
    ],
)
def test_refused(options, said):
    given = {"batch": (1, 8)} | options
    with pytest.raises(surgery.OptionError, match=said):
        surgery.plan(make("plain"), given.pop("batch"), "recompute", **given)


def test_the_device_that_is_here_is_measured_once():
    found = device_named("here")
    assert found is device_named("Here") and found is not None and not found.accelerator
    assert found.memory == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # A product of 2,048^3 takes longer than reading its operands once, and that than a launch.
    assert found.single / found.bandwidth > 1 and found.launch < 1e-3
    planned = surgery.plan(make("llama"), (1, 8), "recompute", device="here")
    assert planned.before.milliseconds and planned.after.milliseconds


def test_a_step_is_no_faster_than_its_host():
    """Of a tiny model each operation is there before the host has launched the next."""
    h100 = device_named("h100")
    assert h100 is not None
    inputs, sgd = batch("llama"), partial(SGD, lr=1e-3)
    quick = Loop(device=replace(h100, host=0.0, call=0.0), optimizer=sgd)
    plain, free = (foresee(make("llama"), inputs, (), d) for d in (Loop(device=h100), quick))
    assert plain.milliseconds == pytest.approx(1e3 * plain.launches * h100.host)
    assert free.milliseconds is not None and free.milliseconds < 1e3 * free.launches * h100.host
    mezo = (passes.Mezo(),)
    step = foresee(make("llama"), inputs, mezo, Loop(device=h100, optimizer=sgd))
    assert step.milliseconds is not None
    assert h100.host < step.milliseconds / step.launches / 1e3 < h100.call  # some are compiled
    slow = foresee(make("llama"), inputs, (), Loop(device=replace(h100, bandwidth=1e6)))
    assert slow.milliseconds is not None and slow.milliseconds > 2 * (plain.milliseconds or 0)
    here = device_named("here")
    assert here is not None and here.host == here.call == 0


@pytest.mark.parametrize(
    "row", ["misa", "rso", "velora", "galore", "compress", "mezo", "lozo", "subzero"]
)
@pytest.mark.filterwarnings("ignore:.*scalars that")
def test_kernels_of_accelerators_are_told_apart_by_what_they_count(row):
    """Of the same layout of arguments, one makes 32 numbers for each row and another 96."""
    model = make("llama", tie_word_embeddings=False)
    options = {"optimizer": SGD} if row in ("mezo", "lozo", "subzero") else {}
    found = surgery.plan(model, (2, 16), PASSES[row](), device="h100", **options)
    assert not [text for label, text in found.lines if label == "peak not predicted"]
    assert found.after.peak and found.after.milliseconds
