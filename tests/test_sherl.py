"""sherl beside its equations, written out over plain modules and hooks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from laws import adamw, anatomy, case, deep, weights
from models import adapt, batch, build, loss_of
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parameters_to_vector
from transformers.modeling_layers import GradientCheckpointingLayer

import passes
import surgery
from surgery.memory import measure

FAMILIES = ["llama", "gpt2", "bert", "vit"]
WHERE = {"llama": "model.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer"}
WHERE |= {"vit": "vit.layers"}
NO_DROPOUT: dict[str, Any] = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def model_of(family: str = "llama", blocks: int = 6, **options: Any) -> Any:
    depth = {"n_layer": blocks} if family == "gpt2" else {"num_hidden_layers": blocks}
    cache = {"use_cache": False} if family in ("llama", "gpt2") else {}
    return build(family, **depth, **NO_DROPOUT.get(family, {}), **cache, **options)


class Reference(nn.Module):
    """Each equation of passes/sherl.py as it stands, token by token where that is plainer."""

    def __init__(self, model: nn.Module, stack: str, reads: list[int], d: int, r: int) -> None:
        super().__init__()
        self.model, self.reads, self.kept = model.requires_grad_(False), reads, {}
        self.D = nn.ModuleList(nn.Linear(d, r) for _ in reads)
        self.LN = nn.ModuleList(nn.LayerNorm(r) for _ in reads)
        self.w, self.U = nn.Linear(r, 1), nn.Linear(r, d)
        self.gamma = nn.Parameter(torch.zeros(1))
        layers: Any = model.get_submodule(stack)
        for i in reads:
            layers[i].register_forward_hook(lambda m, x, out, i=i: self.keep(i, out))
        layers[reads[-1] + 1].register_forward_pre_hook(lambda m, x: (self.enter(), *x[1:]))

    def keep(self, i: int, out: Any) -> None:
        self.kept[i] = out if isinstance(out, Tensor) else out[0]

    def enter(self) -> Tensor:
        hs = [self.kept[i] for i in self.reads]
        zs = [LN(D(h)) for LN, D, h in zip(self.LN, self.D, hs, strict=True)]
        g, shallow = zs[-1], zs[:-1]
        s = []
        for zi in shallow:
            rho = sum(functional.cosine_similarity(zi, zj, dim=-1).relu() for zj in shallow)
            s.append(self.w(zi * g).squeeze(-1).relu() / rho)
        total = sum(s) + 1e-8
        y = sum((si / total)[..., None] * zi for si, zi in zip(s, shallow, strict=True)) + g
        return hs[-1] * (1 + torch.tanh(self.gamma / 0.1)) + self.U(y.relu())

    def named(self) -> dict[str, nn.Parameter]:
        """Return what is trained by the names that the side path has."""
        found = {"gate": self.gamma}
        for key, module in (("score", self.w), ("up", self.U)):
            found |= {f"{key}.{n}": p for n, p in module.named_parameters()}
        for i, (D, LN) in enumerate(zip(self.D, self.LN, strict=True)):
            found |= {f"down_{i}.{n}": p for n, p in D.named_parameters()}
            found |= {f"norm_{i}.{n}": p for n, p in LN.named_parameters()}
        return found


def trained(model: Any) -> dict[str, nn.Parameter]:
    return dict(model.side_path.named_parameters())


def steps(model: Any, family: str = "llama", count: int = 3) -> torch.optim.Optimizer:
    optimizer = adamw(model, lr=1e-2)
    for seed in range(count):
        loss_of(model, batch(family, seed=seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize(
    ("family", "late"), [("llama", 1), ("llama", 2), ("gpt2", 1), ("bert", 1), ("vit", 1)]
)
def test_losses_gradients_and_steps_are_those_of_the_equations(family, late):
    ours = model_of(family)
    plain, start = copy.deepcopy(ours).double(), weights(ours)
    surgery.apply(ours, passes.Sherl(taps=3, late=late))
    # evenly spaced over the trunk, of 5 blocks or 4
    reads = {1: [0, 2, 4], 2: [0, 1, 3]}[late]
    assert ours.side_path.reads == [f"{WHERE[family]}.{i}" for i in reads]
    ours.double()
    reference = Reference(plain, WHERE[family], reads, 32, 16).double()
    names = reference.named()
    assert set(names) == set(trained(ours))
    with torch.no_grad():
        for name, parameter in trained(ours).items():
            names[name].copy_(parameter)
    both = [adamw(ours, lr=1e-2), torch.optim.AdamW(names.values(), lr=1e-2, weight_decay=0.1)]
    for seed in range(5):
        inputs = batch(family, seed=seed)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].double()
        losses = [loss_of(each, inputs) for each in (ours, plain)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
        for loss in losses:
            loss.backward()
        for name, parameter in trained(ours).items():
            assert parameter.grad is not None and names[name].grad is not None
            torch.testing.assert_close(
                parameter.grad, names[name].grad, rtol=1e-8, atol=1e-12, msg=name
            )
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in trained(ours).items():
        torch.testing.assert_close(parameter, names[name], rtol=1e-6, atol=1e-9, msg=name)
    for name, value in start.items():  # float32, there and back
        assert torch.equal(ours.get_parameter(name).float(), value), name
        assert ours.get_parameter(name).grad is None


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.float32) for family in FAMILIES]
    + [("llama", torch.bfloat16), ("llama", torch.float16)],
)
def test_the_first_forward_is_the_models_own(family, dtype):
    model, inputs = model_of(family).to(dtype), batch(family)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    expected = model(**inputs)
    surgery.apply(model, "sherl")
    found = model(**inputs)
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.logits, expected.logits)
    found.loss.backward()
    assert all(p.dtype == torch.float32 for p in trained(model).values())
    assert any(p.grad.any() for p in trained(model).values())
    assert all(
        p.grad is None for n, p in model.named_parameters() if not n.startswith("side_path.")
    )


def test_what_a_step_holds_does_not_grow_with_depth():
    inputs = batch("llama", rows=4, length=64)

    def held(blocks: int, spec: Any) -> tuple[int, int]:
        """Bytes kept between forward and backward, and the most in a step, by the allocator."""
        model = model_of("llama", blocks)
        if spec is not None:
            surgery.apply(model, spec)
        loss_of(model, inputs).backward()
        kept = measure(lambda: loss_of(model, inputs), torch.device("cpu")).live
        return kept, measure(lambda: loss_of(model, inputs).backward(), torch.device("cpu")).peak

    four, twelve = (held(blocks, passes.Sherl(taps=3)) for blocks in (4, 12))
    assert twelve == four
    plain = [held(blocks, None) for blocks in (4, 12)]
    assert plain[1][0] > 2.5 * plain[0][0] and twelve[1] < plain[1][1] / 5


@pytest.mark.parametrize("others", [["recompute"], ["chunked_loss"], ["recompute", "chunked_loss"]])
def test_exact_passes_go_along(others):
    alone, both = model_of(), model_of()
    surgery.apply(alone, "sherl")
    surgery.apply(both, ["sherl", *others])
    for model in (alone, both):
        steps(model)
    torch.testing.assert_close(
        parameters_to_vector(trained(both).values()),
        parameters_to_vector(trained(alone).values()),
        rtol=1e-3,
        atol=1e-5,
    )


def test_rounded_activations_go_along():
    steps(surgery.apply(model_of(), ["sherl", "compress"]))


@pytest.mark.skipif(
    "__call__" in vars(GradientCheckpointingLayer), reason="transformers checkpoints hooks, too"
)
@pytest.mark.parametrize("applied", [True, False])
def test_gradient_checkpointing_changes_nothing_where_it_is_inside_of_hooks(applied):
    """As the blocks of transformers have it; two forwards, and then two backwards."""
    gradients = []
    for checkpointing in (False, True):
        model = model_of()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        side = passes.Sherl().start(model).side
        side.put_on(model)
        with torch.no_grad():
            side.up.weight.fill_(0.1)
        if applied:
            surgery.apply(model, "sherl")
        losses = [loss_of(model, batch("llama", seed=seed)) for seed in (1, 2)]
        for loss in losses:
            loss.backward()
        gradients.append([p.grad for p in side.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_block_that_runs_again_by_itself_is_an_error():
    """As a checkpoint around the hooks does in backward."""
    model: Any = surgery.apply(model_of(), "sherl")
    steps(model, count=1)
    last = model.get_submodule(model.side_path.reads[-1])
    with torch.no_grad(), pytest.raises(surgery.ModelError, match=r"1 of the 4 blocks.*have run"):
        last(torch.zeros(1, 2, 32), position_embeddings=[torch.ones(1, 2, 8)] * 2)


def test_a_forward_that_ended_in_an_error_leaves_nothing_behind():
    model, inputs = model_of(), batch("llama")
    surgery.apply(model, "sherl")
    steps(model)
    with torch.no_grad():
        expected = model(**inputs).logits

        def fails(*_: Any) -> None:
            raise KeyboardInterrupt

        handle = model.model.layers[3].register_forward_pre_hook(fails)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        handle.remove()
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("spec", "blocks", "error", "said"),
    [
        (passes.Sherl(late=5), 6, surgery.TargetError, "leaves a trunk of 1.*two blocks or more"),
        (passes.Sherl(late=6), 6, surgery.TargetError, "leaves a trunk of 0.*two blocks or more"),
        (passes.Sherl(late=7), 6, surgery.TargetError, "leaves a trunk of 0.*two blocks or more"),
        (passes.Sherl(late=12), 6, surgery.TargetError, "leaves a trunk of 0.*two blocks or more"),
        (passes.Sherl(within="nowhere"), 6, surgery.TargetError, r"\['model.layers'\]"),
        ([passes.Sherl(), passes.Misa()], 6, surgery.ConflictError, "sherl and misa"),
        ([passes.Sherl(), passes.Mezo()], 6, surgery.ConflictError, "sherl and mezo"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(spec, blocks, error, said):
    model = model_of("llama", blocks)
    before = anatomy(model)
    with pytest.raises(error, match=said):
        surgery.apply(model, spec)
    assert anatomy(model) == before


def test_models_that_need_a_word_more_say_which():
    with pytest.raises(surgery.TargetError, match=r"2 lists.*within='encoder.block'"):
        surgery.apply(build("t5", num_layers=4), "sherl")
    model = build("t5", num_layers=4)
    surgery.apply(model, passes.Sherl(within="decoder.block"))
    steps(model, "t5")
    with pytest.raises(surgery.TargetError, match="merge_and_unload"):
        surgery.apply(adapt(model_of(), "lora"), "sherl")
    taken = model_of()
    taken.side_path = nn.Identity()
    with pytest.raises(surgery.ModelError, match="has an attribute 'side_path' of its own"):
        surgery.apply(taken, "sherl")
    wrong = surgery.apply(model_of(), passes.Sherl(hidden=31))
    with pytest.raises(Exception, match=r"hidden=32"):
        steps(wrong, count=1)
    put = surgery.remove(surgery.apply(case("sherl").model(), "sherl"))
    with pytest.raises(surgery.OptionError, match="differs from the side path on the model"):
        surgery.apply(put, passes.Sherl(width=3))


def test_one_channel_has_no_norm():
    with pytest.raises(surgery.OptionError, match="width=1 must be at least 2"):
        surgery.apply(model_of(), passes.Sherl(width=1))


def test_a_side_path_that_no_forward_runs_is_an_error():
    model = torch.fx.symbolic_trace(deep("plain"))
    surgery.apply(model, "sherl")
    with pytest.raises(surgery.CaptureError, match=r"does not reach the output|is not read"):
        model(**case("sherl").inputs(seed=1)).backward()
