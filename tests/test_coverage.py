"""Reached, unused, lost: what a training forward says of the weights that passes target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from laws import state_of, weights
from models import inputs_of, loss_of, make
from torch import nn
from torch.fx import GraphModule

import passes
import surgery
from surgery.graph.nodes import gate
from surgery.passkit import Method, Saved, all_graphs, insert, node

# -- unused is not unreached -----------------------------------------------------------------------


class Pooled(nn.Module):
    """Has a pooler and a mask token that its loss does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.mask_token = nn.Parameter(torch.randn(16))
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.norm = nn.BatchNorm1d(16)
        self.pooler = nn.Linear(16, 16)
        self.head = nn.Linear(16, 32)

    def forward(self, tokens: torch.Tensor, pool: bool = False) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + torch.dropout(torch.relu(block(x)), 0.1, True)
        x = self.norm(x.flatten(0, 1))
        if pool:
            x = torch.tanh(self.pooler(x)) + self.mask_token
        return nn.functional.cross_entropy(self.head(x), tokens.flatten())


UNUSED = {"mask_token", "pooler.weight", "pooler.bias"}
TRAINED_OUTSIDE = {
    "lisa": lambda: passes.Lisa(layers=1, period=1),
    "mezo": lambda: passes.Mezo(weight_decay=0.1),
    "mezo, dense": lambda: passes.Mezo(dense=True),
    "sparse_mezo": lambda: passes.SparseMezo(),
    "lozo": lambda: passes.Lozo(),
    "subzero": lambda: passes.SubZero(rank=2),
    "misa": lambda: passes.Misa(budget=0.6, always=["pooler", "mask_token"]),
    "rso": lambda: passes.Rso(rank=4, targets=["pooler", "blocks.0", "blocks.1"]),
    "velora": lambda: passes.Velora(groups=4, targets=["pooler", "blocks.0"]),
}


@pytest.mark.parametrize("row", TRAINED_OUTSIDE)
def test_weights_that_no_forward_uses_are_left_alone_and_listed(row):
    model = Pooled()
    surgery.apply(model, TRAINED_OUTSIDE[row]())
    before, tokens = weights(model), inputs_of("plain", rows=4)["tokens"]
    rate = 1e-4 if "zo" in row else 1e-2
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(3):
        model(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    now = weights(model)
    assert all(torch.equal(now[name], before[name]) for name in UNUSED)
    assert any(not torch.equal(now[name], before[name]) for name in now)
    targeted = {site.name for site in state_of(model).decision.sites} & UNUSED
    assert targeted and set(state_of(model).coverage.unused) == targeted
    text = str(surgery.report(model))
    assert "unused by every forward" in text and all(name in text for name in targeted)


@pytest.mark.parametrize("row", ["lisa", "mezo"])
def test_telling_unused_from_lost_leaves_generators_and_statistics_alone(row):
    model, plain, tokens = Pooled(), Pooled(), inputs_of("plain", rows=4)["tokens"]
    plain.load_state_dict(model.state_dict())
    surgery.apply(model, row, **({"layers": 1} if row == "lisa" else {}))
    drawn = []
    for each in (model, plain):
        torch.manual_seed(3)
        each(tokens)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    if row == "lisa":  # two forwards leave batch norm's statistics as they are
        for name, buffer in plain.named_buffers():
            assert torch.equal(model.get_buffer(name), buffer), name


def test_a_weight_that_a_later_forward_uses_is_trained_from_then_on():
    model = surgery.apply(Pooled(), "mezo")
    tokens = inputs_of("plain")["tokens"]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for pool in (False, True):
        before = weights(model)
        model(tokens, pool=pool).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {n for n, w in weights(model).items() if not torch.equal(w, before[n])}
        assert (moved >= UNUSED) == pool and (not moved & UNUSED) == (not pool)
    assert state_of(model).coverage.unused == []


@pytest.mark.parametrize("row", ["lisa", "mezo"])
def test_the_mask_token_of_vit_and_the_pooler_of_bert(row):
    config = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=64, **config))
    vit = transformers.ViTModel(
        transformers.ViTConfig(image_size=16, patch_size=8, **config), use_mask_token=True
    )
    ids = torch.randint(0, 64, (2, 8))
    for model, inputs, unused in (
        (bert, {"input_ids": ids}, []),  # its output has what the pooler makes, whoever reads it
        (vit, {"pixel_values": torch.randn(2, 3, 16, 16)}, ["embeddings.mask_token"]),
    ):
        surgery.apply(model.train(), row)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        model(**inputs).last_hidden_state.square().mean().backward()
        optimizer.step()
        assert state_of(model).coverage.unused == unused


class Hidden(nn.Module):
    """Reads one of its weights where Dynamo cannot follow, and never reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[2](self.hidden(self.layers[0](x))).sum()

    @torch.compiler.disable
    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.layers[1].weight, self.layers[1].bias)


@pytest.mark.parametrize("row", ["badam", "lisa", "mezo"])
def test_what_is_used_and_was_not_reached_still_raises(row):
    model = Hidden()
    surgery.apply(model, row, **({"layers": 4} if row == "lisa" else {}))
    with pytest.raises(surgery.CaptureError, match=r"layers\.1\.weight.*targets=") as error:
        model(torch.randn(2, 4))
    assert "layers.3" not in str(error.value)


class Cut(nn.Module):
    """None of its parts can be captured: a function of the user's, or a loop over torch's own."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU()) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            if self.way == "loop":
                torch._dynamo.graph_break()
                x = block(x)
            else:
                x = self.hidden(block, x)
        return x.sum()

    @torch.compiler.disable
    def hidden(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return block(x)


@pytest.mark.parametrize("way", ["loop", "function"])
@pytest.mark.parametrize("row", ["recompute", "compress"])
def test_an_exact_pass_without_any_graph_raises(row, way):
    model = surgery.apply(Cut(way), row)
    with pytest.raises(surgery.CaptureError, match=rf"{row} had no effect.*compiler\.disable"):
        model(torch.randn(4, 64))
    surgery.remove(model)
    model(torch.randn(4, 64)).backward()


# -- only real tensors count -----------------------------------------------------------------------


def changed_behind_gates(method: Any, graph: GraphModule) -> None:
    for body in all_graphs(graph):
        for read in body.graph.find_nodes(op="call_function", target=gate):
            users = list(read.users)
            if users:
                new = insert(body, passed_on, method, read, before=users[0])
                read.replace_all_uses_with(new, delete_user_cb=lambda user, n=new: user is not n)
        body.recompile()


@node
def passed_on(method: Any, weight: torch.Tensor) -> torch.Tensor:
    return weight * 1.0


@surgery.register("behind_gates")
@dataclass(frozen=True, kw_only=True)
class BehindGates:
    """Another package's pass: it changes every weight between its gate and what reads it."""

    after: tuple[str, ...] = ()

    def start(self, model: nn.Module) -> Method:
        return Changing(options=self)


@dataclass(eq=False, kw_only=True)
class Changing(Method):
    options: BehindGates
    name: str = "behind_gates"

    @property
    def after(self) -> Any:
        return self.options.after

    def rewrite(self, graph: GraphModule, inputs: Any, saved: Saved) -> None:
        changed_behind_gates(self, graph)


@pytest.mark.parametrize(
    ("make_pass", "after", "checkpointed"),
    [
        (lambda: passes.Rso(rank=4), (), False),
        (lambda: passes.Rso(rank=4), ("rso",), True),
        (lambda: passes.Velora(groups=4), ("velora",), False),
        (lambda: passes.Velora(groups=4), (), True),
    ],
    ids=["rso, before", "rso, after", "velora, after", "velora, before"],
)
def test_a_node_of_another_pass_behind_a_gate_does_not_break_identity(
    make_pass: Callable[[], Any], after, checkpointed
):
    grads = []
    for more in ([], [BehindGates(after=after)]):
        model = make("llama")
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        surgery.apply(model, [make_pass(), *more])
        loss_of(model, inputs_of("llama")).backward()
        projected = [c for c in surgery.coordinates(model) if c.parameter.grad is not None]
        assert len(projected) == len(surgery.coordinates(model))
        grads.append([c.parameter.grad for c in projected])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_a_dry_run_reaches_nothing(monkeypatch):
    """A node that loses the weight's identity in real runs is told, though the account found it."""
    from surgery.weights import sites

    found = sites.site_of
    monkeypatch.setattr(sites, "read", lambda place: found(place) if sites.is_fake(place) else None)
    model = surgery.apply(make("llama"), passes.Rso(rank=4))
    with pytest.raises(surgery.CaptureError, match=r"not reached|not read by a Linear"):
        loss_of(model, inputs_of("llama"))
