"""SHERL: a side path over a frozen trunk, into its last blocks. arXiv 2407.07523 (ECCV 2024).

Of L blocks, the last `late` are the late route; the others are the trunk, which has no backward.
With h_1 .. h_k the outputs of k blocks of the trunk, h_k that of its last block, and g = z_k the
guide, for each token

    z_i = LN(D_i h_i),    rho_i = sum_{j<k} relu(cos(z_i, z_j))
    y = sum_{i<k} a_i z_i + g,    s_i = relu(w . (z_i * g)) / rho_i,    a_i = s_i / sum_j s_j
    h <- (1 + tanh(gamma / 0.1)) h_k + U relu(y)

and the late route reads h. Only D, LN, w, U, gamma are trained. U and gamma begin at zero, so that
the first output is the model's own. The published code has LN(U relu(y)) + tanh(gamma / 0.1) h_k,
with U and gamma initialised as usual, which at first removes the trunk's own stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from surgery.passkit import (
    EVERY,
    Addition,
    CaptureError,
    Coordinate,
    Method,
    ModelError,
    Taps,
    TargetError,
    check_types,
    demand,
    evenly,
    lora_layers,
    noise,
    one_stack,
    read_addition,
    register,
    trained_in,
    width_of,
)


@register("sherl")
@dataclass(frozen=True, kw_only=True)
class Sherl:
    """Options of SHERL.

    taps: k, the number of blocks of the trunk that the side path reads; they are evenly spaced and
    include the last one. late: the number of blocks of the late route. width: the width of z
    (default: half of the model's). hidden: the width of the model, if it cannot be read from its
    norms. within: the name of the list of blocks if the model has several, such as
    "model.language_model.layers".
    """

    saves = ("gradients", "optimizer", "activations")

    taps: int = 4
    late: int = 1
    width: int | None = None
    hidden: int | None = None
    within: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        demand(self.taps >= 2, self, f"taps={self.taps} must be at least 2: a block and the guide.")
        for name, least in (("late", 1), ("width", 2), ("hidden", 1)):  # LN of one channel is 0
            value = getattr(self, name)
            demand(
                value is None or value >= least, self, f"{name}={value} must be at least {least}."
            )

    def start(self, model: nn.Module) -> Routing:
        """Make a side path for a model, or take the one on it; changes nothing. Raises TargetError,
        OptionError, ModelError."""
        present = getattr(model, SidePath.key, None)
        if present is None:
            side = _made(model, self)
            side.begin(self.seed)
        elif isinstance(present, SidePath):
            side = present
            same = self == Sherl(seed=self.seed) or _recipe(model, self) == side.recipe()
            other = (
                f"{self!r} differs from the side path on the model: {dict(side.recipe())}. Give "
                "the same options, or take that off first: model.side_path.take_off(model)."
            )
            demand(same, self, other)
        else:
            raise ModelError(
                f"sherl: {type(model).__name__} has an attribute {SidePath.key!r} of its own, and "
                "the side path needs that name. Rename yours."
            )
        trained = [n for n, p in side.named_parameters() if p.requires_grad]
        if not trained:
            raise TargetError(
                "sherl: the side path on this model is frozen, so nothing would be trained. "
                "Unfreeze it first: model.side_path.requires_grad_(True)."
            )
        return Routing(
            side=side,
            coordinates=trained_in(side, trained),
            additions=[side] if present is None else [],
        )


@dataclass(eq=False, kw_only=True)
class Routing(Method):
    name: str = "sherl"
    side: SidePath
    coordinates: Sequence[Coordinate]
    additions: Sequence[Addition]
    compiles = True
    conflicts: ClassVar = {
        EVERY: "its side path is all that is trained, and below the late route there is no "
        "backward, so {other} has nothing to work on",
        "recompute": None,
        "chunked_loss": None,
        "compress": None,
    }

    def check_reached(self) -> None:
        if any(each.unused for each in self.coordinates):
            raise CaptureError(
                "sherl: the side path does not reach the output: this model does not call its "
                f"blocks ({self.side.reads[-1]}), so hooks on them never run. If it is a "
                "GraphModule, apply the pass to the model that it was traced from."
            )

    def lines(self) -> Iterable[tuple[str, str]]:
        yield "side path", f"{sum(p.numel() for p in self.side.parameters()):,} parameters"
        yield "read", ", ".join(self.side.reads)


class SidePath(Taps):
    """The side path; an ordinary module on an ordinary model.

    width: of z. like: a weight of the model: all is on its device, in float32 or wider.
    """

    key, made_by = "side_path", "sherl"

    def __init__(self, reads: Sequence[str], hidden: int, width: int, like: Tensor) -> None:
        super().__init__(reads, hidden)
        self.width = width
        for i in range(len(reads)):
            self.add_module(f"down_{i}", _Affine((width, hidden), like))
            self.add_module(f"norm_{i}", _Affine((width,), like))
        self.score = _Affine((1, width), like)
        self.up = _Affine((hidden, width), like)
        self.gate = _parameter((1,), like)

    def begin(self, seed: int) -> None:
        """Set all weights to where training begins, as a function of the seed."""
        for name, parameter in self.named_parameters():
            owner = name.rpartition(".")[0]
            with torch.no_grad():
                parameter.fill_(1.0 if name.startswith("norm") and name.endswith("weight") else 0.0)
                if parameter.ndim == 2 and owner != "up" and not parameter.is_meta:
                    start = noise.normal(tuple(parameter.shape), seed, "sherl", name)
                    parameter.copy_(start / parameter.shape[1] ** 0.5)

    def recipe(self) -> Mapping[str, Any]:
        return {"reads": self.reads, "hidden": self.hidden, "width": self.width}

    def forward(self, hs: Sequence[Tensor]) -> Tensor:
        """Return what the late route reads (..., hidden), of k outputs of the trunk."""
        down = [self.get_submodule(f"down_{i}")(h) for i, h in enumerate(hs)]
        *shallow, g = [self.get_submodule(f"norm_{i}")(d) for i, d in enumerate(down)]
        z = torch.stack(shallow, -2)  # (..., k - 1, width)
        unit = functional.normalize(z, dim=-1, eps=1e-6)
        rho = (unit @ unit.transpose(-1, -2)).relu().sum(-1, keepdim=True)
        s = self.score(z * g.unsqueeze(-2)).relu() / rho
        s = s.to(torch.promote_types(s.dtype, torch.float32))  # 1e-8 is 0 in float16
        a = s / (s.sum(-2, keepdim=True) + 1e-8)
        y = (a.to(z.dtype) * z).sum(-2) + g
        last = hs[-1]
        stays = 1 + torch.tanh(self.gate / 0.1)
        return last * stays.to(last.dtype) + self.up(y.relu()).to(last.dtype)


def load_side_path(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put the side path of an export (its folder `side_path`) on a model.

    The model's outputs are then those of the model that was exported.
    `model.side_path.take_off(model)` takes it off again. The model needs no surgery for this;
    `surgery.apply(model, "sherl")` goes on training the side path. Returns the same model.
    """
    recipe, state = read_addition(folder)
    names = {name for name, _ in model.named_modules()}
    if missing := [name for name in recipe["reads"] if name not in names]:
        raise ModelError(
            f"this side path reads {missing[0]}, which {type(model).__name__} does not have. Load "
            "it on the model that it was trained beside, or on another with the same blocks."
        )
    first = next(model.get_submodule(recipe["reads"][0]).parameters())
    side = SidePath(**recipe, like=first)
    side.load_state_dict(state)
    side.train(model.training).put_on(model)
    return model


def _made(model: nn.Module, options: Sherl) -> SidePath:
    if lora_layers(model):
        raise TargetError(
            "sherl: this model has PEFT adapters, and below the late route nothing gets a "
            "gradient. Merge them first: model = model.merge_and_unload()."
        )
    recipe = _recipe(model, options)
    first = next(model.get_submodule(recipe["reads"][0]).parameters())
    if isinstance(first, DTensor):
        raise ModelError(
            "sherl: this model is already sharded, and a side path added now would not be. Apply "
            'first: surgery.apply(model, "sherl"), then fully_shard the blocks and the model.'
        )
    return SidePath(**recipe, like=first).train(model.training)


def _recipe(model: nn.Module, options: Sherl) -> dict[str, Any]:
    """Return what a side path for a model is made of."""
    stack = one_stack(model, options.within, "sherl")
    trunk = stack[: max(0, len(stack) - options.late)]
    if len(trunk) < 2:
        raise TargetError(
            f"sherl: the model's list of blocks has {len(stack)}, and late={options.late} leaves a "
            f"trunk of {len(trunk)}. The side path needs two blocks or more there: use a smaller "
            "late=, or another pass, such as misa."
        )
    hidden = options.hidden or width_of(model.get_submodule(trunk[0]), "sherl")
    width = options.width or max(1, hidden // 2)
    return {"reads": evenly(trunk, options.taps), "hidden": hidden, "width": width}


class _Affine(nn.Module):
    """A weight and a bias of its rows, read in the dtype of x: of a Linear, or of a LayerNorm if it
    is a vector."""

    def __init__(self, size: tuple[int, ...], like: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = _parameter(size, like), _parameter(size[:1], like)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if weight.ndim == 1:
            return functional.layer_norm(x, weight.shape, weight, bias)
        return functional.linear(x, weight, bias)


def _parameter(size: tuple[int, ...], like: Tensor) -> nn.Parameter:
    dtype = torch.promote_types(like.dtype, torch.float32)
    return nn.Parameter(torch.empty(size, device=like.device, dtype=dtype))
