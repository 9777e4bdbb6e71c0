"""chunked_loss under losses that people have: inside of the model and in loops of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from models import inputs_of, make
from torch import Tensor, nn
from torch.nn import functional

import surgery
from surgery.logits.factored import Factored

VOCAB, WIDTH = 64, 16
F = functional


class Trunk(nn.Module):
    """A body, a head or two, and a loss of the model's own."""

    def __init__(self, loss: Callable[[Trunk, Tensor, Tensor], Tensor], bias: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])
        self.head = nn.Linear(WIDTH, VOCAB, bias=bias)
        self.other = nn.Linear(WIDTH, VOCAB // 2)
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self, self.layers[0](x).tanh(), y)


def flat(z: Tensor) -> Tensor:
    return z.view(-1, z.shape[-1])


def z_loss(m: Trunk, h: Tensor, y: Tensor) -> Tensor:
    z = m.head(h).float()
    return F.cross_entropy(flat(z), y.view(-1)) + 1e-2 * (z.logsumexp(-1) ** 2).mean()


def two_heads(m: Trunk, h: Tensor, y: Tensor) -> Tensor:
    one = F.cross_entropy(flat(m.head(h)), y.view(-1))
    return one + 0.5 * F.cross_entropy(flat(m.other(h)), y.view(-1).clamp(max=VOCAB // 2 - 1))


def weighted_rows(m: Trunk, h: Tensor, y: Tensor) -> Tensor:
    rows = F.cross_entropy(flat(m.head(h)), y.view(-1), reduction="none")
    return (rows * torch.linspace(0, 1, y.numel())).sum()


def focal(m: Trunk, h: Tensor, y: Tensor) -> Tensor:
    log_p = flat(m.head(h)).log_softmax(-1).gather(-1, y.view(-1, 1).clamp(min=0)).squeeze(-1)
    return (-((1 - log_p.exp()) ** 2) * log_p)[y.view(-1) >= 0].mean()


INSIDE: dict[str, Callable[[Trunk, Tensor, Tensor], Tensor]] = {
    "class weights": lambda m, h, y: F.cross_entropy(
        flat(m.head(h)), y.view(-1), torch.linspace(0.1, 2, VOCAB)
    ),
    "each row": weighted_rows,
    "probabilities": lambda m, h, y: F.cross_entropy(
        flat(m.head(h)), F.one_hot(y.view(-1).clamp(min=0), VOCAB).float() * 0.8 + 0.2 / VOCAB
    ),
    "smoothed": lambda m, h, y: F.cross_entropy(flat(m.head(h)), y.view(-1), label_smoothing=0.1),
    "z-loss": z_loss,
    "soft-capped": lambda m, h, y: F.cross_entropy(flat(torch.tanh(m.head(h) / 5) * 5), y.view(-1)),
    "two heads": two_heads,
    "shifted": lambda m, h, y: F.cross_entropy(
        m.head(h)[..., :-1, :].reshape(-1, VOCAB), y[..., 1:].reshape(-1)
    ),
    "classes second": lambda m, h, y: F.cross_entropy(m.head(h).transpose(1, 2), y),
    "focal": focal,
    "nll": lambda m, h, y: F.nll_loss(F.log_softmax(flat(m.head(h)), dim=-1), y.view(-1)),
}


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    y = torch.randint(0, VOCAB, (3, 7), generator=generator)
    x = torch.randn(3, 7, WIDTH, generator=generator)
    return x, y.masked_fill(torch.rand(3, 7, generator=generator) < 0.4, -100)


def assert_same_gradients(eager: nn.Module, ours: nn.Module, tolerance: float = 1e-6) -> None:
    own = dict(ours.named_parameters())
    for name, p in eager.named_parameters():
        if p.grad is None:
            assert own[name].grad is None or not own[name].grad.any(), name
        else:
            assert (own[name].grad - p.grad).norm() <= tolerance * p.grad.norm() + 1e-8, name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", INSIDE)
def test_losses_inside_of_the_model(name, bias):
    torch.manual_seed(0)
    eager = Trunk(INSIDE[name], bias)
    ours = surgery.apply(copy.deepcopy(eager), "chunked_loss", tokens=5)
    losses = [model(*batch()) for model in (eager, ours)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    assert_same_gradients(eager, ours)
    heads = 2 if name == "two heads" else 1
    assert (
        f"{heads}; losses"
        in dict(next(iter(ours.forward.surgery.decision.methods)).lines())[
            "heads in chunks of rows"
        ]
    )


def test_a_wide_layer_that_is_averaged_over_its_rows_is_no_head():
    class Pooled(Trunk):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            pooled = self.head(x).mean(1)[:, :WIDTH]
            return F.cross_entropy(self.other(pooled), y[:, 0].clamp(0, VOCAB // 2 - 1))

    model = surgery.apply(Pooled(z_loss), "chunked_loss")
    model(*batch()).backward()
    (method,) = model.forward.surgery.decision.methods
    assert method.heads == 1


def small(kind: str, config: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1)
    made = getattr(transformers, config)(**sizes, num_attention_heads=2, **more)
    model = getattr(transformers, kind)(made)
    return model.eval()  # without dropout


HF = {
    "masked language model": ("BertForMaskedLM", "BertConfig", {}),
    "token classifier": ("BertForTokenClassification", "BertConfig", {"num_labels": 5}),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", {"num_key_value_heads": 1, "head_dim": 8}),
}


@pytest.mark.parametrize("name", HF)
def test_models_of_other_kinds(name):
    kind, config, more = HF[name]
    eager = small(kind, config, **more)
    ours = surgery.apply(copy.deepcopy(eager), "chunked_loss", tokens=5)
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, VOCAB, (2, 9), generator=generator)
    labels = ids % more.get("num_labels", VOCAB)
    labels[:, ::3] = -100
    outputs = [model(input_ids=ids, labels=labels) for model in (eager, ours)]
    for output in outputs:
        output.loss.backward()
    assert isinstance(outputs[1].logits, Factored)
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss, rtol=1e-6, atol=0)
    assert_same_gradients(eager, ours)


def in_chunks_as(eager: nn.Module) -> nn.Module:
    """Return a model in chunks whose loss and gradients are those of a Llama."""
    ours = surgery.apply(copy.deepcopy(eager), "chunked_loss", tokens=5)
    inputs = inputs_of("llama", padding="right")
    losses = [model(**inputs).loss for model in (eager, ours)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    assert_same_gradients(eager, ours, 5e-6)
    return ours


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_adapters_on_the_head(dora):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], use_dora=dora)
    torch.manual_seed(0)
    eager = peft.get_peft_model(make("llama"), config)
    for name, p in eager.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    ours = in_chunks_as(eager)
    assert any("lm_head" in n and p.grad is not None for n, p in ours.named_parameters())


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.filterwarnings("error:chunked_loss")  # nothing is made whole
def test_adapters_inside_of_blocks_are_no_heads(dora):
    """Dynamo cuts a forward with DoRA to pieces, which wide layers leave."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", use_dora=dora)
    torch.manual_seed(0)
    eager = peft.get_peft_model(make("llama"), config)
    ours = in_chunks_as(eager)
    (method,) = ours.forward.surgery.decision.methods
    assert (method.heads, method.losses) == (1, 1)


def test_heads_in_a_list_are_heads():
    """Several tokens at a time, as Medusa: each stands in a block of its own."""

    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCAB, WIDTH)
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH))])
            own = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)) for _ in "abc"]
            self.heads = nn.ModuleList(own)

        def forward(self, ids: Tensor) -> list[Tensor]:
            h = self.layers[0](self.embed(ids))
            return [head(h) for head in self.heads]

    torch.manual_seed(0)
    eager = Several()
    ours = surgery.apply(copy.deepcopy(eager), "chunked_loss", tokens=5)
    ids = torch.arange(12).view(2, 6)
    for model in (eager, ours):
        logits = model(ids)
        assert all(isinstance(z, Factored) == (model is ours) for z in logits)
        sum(F.cross_entropy(flat(z), ids.view(-1)) for z in logits).backward()
    assert_same_gradients(eager, ours)


def test_what_follows_the_surgery_in_the_model_gets_plain_tensors():
    """Where Dynamo cuts a forward behind the head, the rest of it runs on logits all the same."""

    class Cut(Trunk):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            z = self.head(self.layers[0](x).tanh())
            torch._dynamo.graph_break()
            return F.cross_entropy(z.view(-1, VOCAB), y.view(-1))

    torch.manual_seed(0)
    eager = Cut(z_loss)
    ours = surgery.apply(copy.deepcopy(eager), "chunked_loss", tokens=5)
    losses = [model(*batch()) for model in (eager, ours)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0])
    assert_same_gradients(eager, ours)
