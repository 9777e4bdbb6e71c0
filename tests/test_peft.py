"""PEFT: adapters of several kinds, surgery before or after them, on the base or the adapters."""

from __future__ import annotations

import pytest
import torch
from laws import Moved, adamw, own, weights
from models import adapt, batch, inputs_of, make
from packaging.version import Version

import passes
import surgery

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*scalars that"),
    pytest.mark.filterwarnings("ignore:(velora|rso) does not reduce the activations"),
]
EXACT = {
    "recompute": passes.Recompute,
    "chunked_loss": passes.ChunkedLoss,
    "misa, all at once": lambda **options: passes.Misa(budget=1.0, **options),
}
# what PEFT trains besides matrices of the blocks
ALSO = {"dora": ".*lora_magnitude_vector.*", "modules_to_save": ".*modules_to_save.default"}
BASE = r".*(q_proj|up_proj|down_proj)(\.base_layer)?"
# what is trained -> the pass
MOVING = {
    "misa of the adapters": lambda: passes.Misa(budget=0.05, period=2),
    "misa of the base": lambda: passes.Misa(budget=0.2, period=2, targets=BASE),
    "misa of both": lambda: passes.Misa(
        budget=0.2, period=2, targets=f"{BASE}|.*lora_[AB].default"
    ),
    "badam of the adapters": lambda: passes.BAdam(period=2),
    "lisa of the adapters": lambda: passes.Lisa(layers=1, period=2),
    "velora of the adapters": lambda: passes.Velora(groups=4, always=".*lora_B.*"),
    "galore of the base": lambda: passes.Galore(rank=2, period=2, targets=BASE),
    "velora of the base": lambda: passes.Velora(groups=4, targets=BASE),
    "rso of the base, adapters frozen": lambda: passes.Rso(rank=2, period=2, targets=BASE),
    "rso of the base, adapters trained": lambda: passes.Rso(
        rank=2, period=2, targets=BASE, always=".*lora_[AB].default"
    ),
    "mezo of the adapters": lambda: passes.Mezo(),
    "sparse_mezo of the adapters": lambda: passes.SparseMezo(keep_fraction=0.5),
    "subzero of the adapters": lambda: passes.SubZero(rank=2),
    "lozo of the base": lambda: passes.Lozo(targets=BASE),
    "flat_lora of the adapters": lambda: passes.FlatLora(),
}


def opened(model):
    """Let the base be trained too: PEFT froze it."""
    for name, parameter in model.named_parameters():
        if "base_layer" in name and any(n in name for n in ("q_proj", "up_proj", "down_proj")):
            parameter.requires_grad_(True)
    return model


def steps(model, optimizer, count: int = 5) -> list[float]:
    losses = []
    for seed in range(count):
        torch.manual_seed(seed)  # dropout
        loss = model(**batch("llama", seed=seed)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("name", "kind"),
    [("recompute", kind) for kind in ("on every Linear", "dora", "dropout", "two adapters")]
    + [("chunked_loss", "lora"), ("chunked_loss", "modules_to_save")]
    + [("misa, all at once", "lora"), ("misa, all at once", "modules_to_save")],
)
def test_exact_passes_leave_the_run_as_it_is(name, kind):
    plain, ours = (adapt(make("llama"), kind) for _ in range(2))
    also = {"always": ALSO[kind]} if "misa" in name and kind in ALSO else {}
    surgery.apply(ours, EXACT[name](**also))
    found = [steps(m, adamw(m), 3) for m in (plain, ours)]
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    after = own(ours)
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(after[key], parameter, rtol=1e-5, atol=1e-6, msg=key)


# DoRA reads the weights themselves, for its norm, beside the Linears.
REFUSED = {
    "misa of the base": "the forward went around surgery",
}


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"),
    reason="its Dynamo captures DoRA as a whole, and the run is the plain one",
)
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_compose_with_dora_is_refused_by_name(name):
    model = adapt(make("llama"), "dora on every Linear")
    model = opened(model) if "base" in name else model
    before = weights(model)
    surgery.apply(model, MOVING[name]())
    with pytest.raises(surgery.SurgeryError, match=REFUSED[name]):
        steps(model, adamw(model), 1)
    assert all(torch.equal(p, before[n]) for n, p in own(model).items())
    surgery.remove(model)


# Every pass meets LoRA, and every kind of adapters a pass of each kind.
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "lora") for name in MOVING]
    + [(f"{name} of the adapters", "dora") for name in ("misa", "mezo", "velora")]
    + [("rso of the base, adapters frozen", "dora on every Linear")]
    + [("misa of both", "on every Linear"), ("velora of the adapters", "on every Linear")]
    + [("velora of the adapters", "dropout"), ("mezo of the adapters", "dropout")]
    + [("misa of the adapters", "modules_to_save"), ("lozo of the base", "modules_to_save")]
    + [("flat_lora of the adapters", kind) for kind in ("dropout", "modules_to_save")]
    + [("badam of the adapters", "two adapters"), ("flat_lora of the adapters", "two adapters")]
    + [("rso of the base, adapters trained", "two adapters")],
)
def test_each_pass_moves_what_it_trains_and_nothing_else(name, kind):
    model = adapt(make("llama"), kind)
    model = opened(model) if "base" in name or "both" in name else model
    before = weights(model)
    surgery.apply(model, MOVING[name]())
    optimizer = adamw(model, lr=1e-2)
    moved = Moved(model, optimizer)
    optimizer.register_step_post_hook(moved.move)
    steps(model, optimizer, 4)
    trained = {c.weight for c in surgery.coordinates(model)}
    assert trained
    changed = set()
    for key, parameter in own(model).items():
        torch.testing.assert_close(parameter.detach(), moved.weights[key], msg=key)
        if not torch.equal(parameter, before[key]):
            changed.add(key)
    assert changed <= trained
    base, adapters = ({n for n in changed if ("lora_" in n) == yes} for yes in (False, True))
    assert bool(base) == ("base" in name or "both" in name) or kind == "modules_to_save"
    assert bool(adapters) == (("adapters" in name and "frozen" not in name) or "both" in name)
    surgery.remove(model)
    merged = model.merge_and_unload()
    with torch.no_grad():
        expected = model(**batch("llama")).loss
    assert torch.isfinite(expected) and not any("lora_" in n for n, _ in merged.named_parameters())


@pytest.mark.parametrize("name", ["recompute", "misa", "rso", "velora", "mezo"])
def test_surgery_before_the_adapters(name):
    """The base's weights are trained as surgery says, the adapters as PEFT says."""
    specs = {
        "recompute": passes.Recompute(),
        "misa": passes.Misa(budget=0.2, period=2),
        "rso": passes.Rso(rank=2, period=2),
        "velora": passes.Velora(groups=4),
        "mezo": passes.Mezo(),
    }
    model = make("llama")
    flags = {id(p): p.requires_grad for p in model.parameters()}
    surgery.apply(model, specs[name])
    wrapped = adapt(model, "lora")
    before = weights(wrapped)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    steps(wrapped, optimizer)
    changed = {n for n, p in own(wrapped).items() if not torch.equal(p, before[n])}
    assert any("lora_" in n for n in changed)
    assert any("base_layer" in n for n in changed) == (name != "recompute")
    surgery.remove(wrapped)
    assert all(p.requires_grad == flags[id(p)] for p in wrapped.parameters() if id(p) in flags)


def test_an_optimizer_built_from_what_peft_left_trainable_is_refused():
    model = surgery.apply(make("llama"), "lisa", layers=1)
    wrapped = adapt(model, "lora")
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad])
    with pytest.raises(surgery.OptimizerError, match=r"get_peft_model after surgery\.apply"):
        steps(wrapped, optimizer, 1)


def test_switching_adapters_during_a_run():
    model = adapt(make("llama"), "two adapters")
    surgery.apply(model, passes.Recompute())
    plain = adapt(make("llama"), "two adapters")
    for each in (model, plain):
        optimizer = adamw(each)
        for adapter in ("default", "second", "default"):
            each.set_adapter(adapter)
            steps(each, optimizer, 2)
        with each.disable_adapter():
            assert torch.isfinite(each(**inputs_of("llama")).loss)
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(own(model)[key], parameter, rtol=1e-5, atol=1e-6, msg=key)
