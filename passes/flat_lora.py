"""Flat-LoRA: low-rank adaptation to a flat place of the full weights. arXiv 2409.14396 (ICML 2025).

With W frozen and A, B trained, minimise the loss that random noise on the merged weight leaves,

    min over A, B of E[ f(W + s B A + eps) ],    eps_ij ~ N(0, sigma_i^2)
    sigma_i = c(t) rho norm(W'_i) / sqrt(n_in),    W' = W + s B A,    c(t) = (1 - cos(pi t / T)) / 2

eps is drawn in forward and again in backward, from (seed, weight, step): W is never written and eps
never held. (The published code adds eps to W and subtracts it again, which bfloat16 does not
restore, and reseeds torch's generator in each step.) Micro-batches of a step share one eps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from surgery.passkit import (
    CaptureError,
    Counting,
    ModelError,
    Saved,
    TargetError,
    Targets,
    bodies,
    check_types,
    demand,
    first_order_only,
    insert,
    is_by_identity,
    is_linear,
    linear,
    listed,
    lora_factors,
    lora_layers,
    matched,
    node,
    noise,
    noisy,
    operands,
    register,
    take_place,
    wide,
)


@register("flat_lora")
@dataclass(frozen=True, kw_only=True)
class FlatLora:
    """Options of Flat-LoRA, for models with PEFT's LoRA on Linears.

    rho: the norm of the noise on a row of W', as a share of the row's own norm. steps: T, the
    number of optimizer steps over which c rises from 0 to 1 (None: c is 1 from the first step on).
    targets: which of the Linears with adapters get noise (default: all).
    """

    saves = ()

    rho: float = 0.05
    steps: int | None = None
    targets: Targets = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        demand(math.isfinite(self.rho) and self.rho >= 0, self, f"rho={self.rho} must be >= 0.")
        good = self.steps is None or self.steps >= 1
        demand(good, self, f"steps={self.steps} must be at least 1, or None.")

    def start(self, model: nn.Module) -> Noising:
        """Find the adapters of a model; changes nothing. Raises TargetError."""
        layers = lora_layers(model)
        if self.targets is not None:
            hit = matched(model, self.targets, "targets")
            layers = {n: v for n, v in layers.items() if hit & {n, f"{n}.base_layer"}}
        if not layers:
            raise TargetError(
                "flat_lora: no target is a floating-point Linear with LoRA. Add LoRA first: "
                "model = peft.get_peft_model(model, peft.LoraConfig(...)). Quantised layers, "
                "convolutions and embeddings get no noise."
            )
        for name, (layer, kind) in layers.items():
            _check(name, layer.get_submodule("base_layer").get_parameter("weight"), kind)
        return Noising(options=self, layers={name: layer for name, (layer, _) in layers.items()})


def _check(name: str, weight: Tensor, kind: str | None) -> None:
    leave = "leave it out of targets=."
    if kind is not None:
        raise TargetError(
            f"flat_lora: {name} is not plain LoRA but {kind}, so its weight is not W + s B A. Use "
            f"plain LoRA, LoraConfig(use_dora=False), or {leave}"
        )
    if weight.requires_grad:
        raise TargetError(f"flat_lora: {name}.base_layer is not frozen. Freeze it, or {leave}")
    if not weight.is_floating_point() or weight.ndim != 2:
        raise TargetError(
            f"flat_lora: {name}.base_layer is {weight.dtype} of {weight.ndim} dimensions. Noise "
            f"can only be added to floating-point matrices; {leave}"
        )


@dataclass(eq=False, kw_only=True)
class Noising(Counting):
    options: FlatLora
    name: str = "flat_lora"
    layers: dict[str, nn.Module]  # with adapters
    reached: set[str] = field(default_factory=set)
    places: dict[int, str] = field(default_factory=dict)  # id of a weight -> its layer

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"places": {}}

    def rewrite(self, graph: GraphModule, inputs: Sequence[Any], saved: Saved) -> None:
        given = zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True)
        found = {n for n, t in given if isinstance(t, Tensor) and self.layer_of(t) is not None}
        self._rewrite(graph, found)

    def _rewrite(self, graph: GraphModule, weights: set[Node]) -> None:
        for each in [*graph.graph.nodes]:
            if is_by_identity(each) and weights.issuperset(each.all_input_nodes):
                weights.add(each)  # a gate
            if is_linear(each) and operands(each)[1] in weights:
                x, weight, *more = operands(each)
                how = (more[0] if more else None, each.target is torch.addmm)
                take_place(insert(graph, noised, self, x, weight, *how, before=each), each)
        for runs, body in [*bodies(graph)]:
            own = zip(body.graph.find_nodes(op="placeholder"), runs.args[1:], strict=True)
            self._rewrite(body, {inner for inner, outer in own if outer in weights})
            body.recompile()

    def layer_of(self, weight: Tensor) -> str | None:
        """Return the name of the layer whose W a tensor is; under FSDP2, of the whole W."""
        name = self.places.get(id(weight))
        if name is None or _weight_of(self.layers[name]) is not weight:
            self.places |= {id(_weight_of(layer)): name for name, layer in self.layers.items()}
            name = self.places.get(id(weight))
        return name if name and _weight_of(self.layers[name]) is weight else None

    def sigma(self, name: str, weight: Tensor, transposed: bool) -> Tensor | None:
        """Return the deviation of eps in each row of W (out, in); None where there is no noise."""
        weight = weight.t() if transposed else weight
        c = 1.0
        if self.options.steps is not None:
            c = (1 - math.cos(math.pi * min(self.step / self.options.steps, 1.0))) / 2
        adapters = lora_factors(self.layers[name])
        if c * self.options.rho == 0 or adapters is None:
            return None
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            square = torch.linalg.vector_norm(weight, dim=1, dtype=wide(weight)).square()
            if adapters:  # of W + s B A, which is never formed
                a = torch.cat([a for a, _, _ in adapters]).to(square)
                b = torch.cat([s * b.to(square) for _, b, s in adapters], dim=1)
                cross = (weight @ a.t().to(weight)).to(square)
                square += ((2 * cross + b @ (a @ a.t())) * b).sum(1)
            return square.clamp_(min=0).sqrt() * (c * self.options.rho / math.sqrt(weight.shape[1]))

    def check_reached(self) -> None:
        missing = sorted(set(self.layers) - self.reached)
        if missing:
            raise CaptureError(
                f"flat_lora: {listed(missing)} is not read by a Linear in the captured forward, so "
                "it gets no noise. Leave it out of targets=."
            )

    def lines(self) -> Iterable[tuple[str, str]]:
        yield "noise", f"on {len(self.layers)} weights with adapters, rho {self.options.rho:g}"


def _weight_of(layer: Any) -> Tensor:
    return layer.base_layer.weight


@node(fake=linear)
def noised(
    method: Noising, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool
) -> Tensor:
    """Return x (W + eps)^T + b, or x (W + eps) + b of a W that is stored as (in, out)."""
    name = method.layer_of(weight)
    if name is None:
        return linear(x, weight, bias, transposed)
    method.reached.add(name)
    if weight.requires_grad:
        raise ModelError(
            f"flat_lora: {name}.base_layer was unfrozen (requires_grad=True) after surgery.apply, "
            "and its gradient would be that of the noisy weight. Freeze it again."
        )
    sigma = method.sigma(name, weight, transposed)
    if sigma is None:
        return linear(x, weight, bias, transposed)
    key = noise.bits(method.options.seed, "flat_lora", name, method.step)
    return _Noised.apply(x, weight, bias, sigma, key, transposed)


class _Noised(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, *how: Any
    ) -> Tensor:
        ctx.how, ctx.given, kind = how, (x.shape, x.dtype), x.device.type
        ctx.bias = None if bias is None else bias.dtype
        ctx.save_for_backward(weight, sigma)
        cast = torch.is_autocast_enabled(kind)
        rows = x.reshape(-1, x.shape[-1]).to(torch.get_autocast_dtype(kind) if cast else x.dtype)
        y = _product(rows, weight, sigma, *how, back=False)
        y = y if bias is None else y.add_(bias)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        first_order_only("flat_lora")
        weight, sigma = ctx.saved_tensors
        shape, dtype = ctx.given
        rows = grads[0].reshape(-1, grads[0].shape[-1])
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = _product(rows, weight, sigma, *ctx.how, back=True).view(shape).to(dtype)
        if ctx.needs_input_grad[2]:
            db = rows.sum(0).to(ctx.bias)
        return dx, None, db, None, None, None


def _product(
    rows: Tensor, weight: Tensor, sigma: Tensor, key: int, transposed: bool, back: bool
) -> Tensor:
    """Return the product of rows with W + eps (out, in), from the right if `back`, else with its
    transpose."""
    scale = sigma[None] if transposed else sigma[:, None]
    across = transposed == back  # whether rows of the weight as stored are channels of the result
    found = rows.new_empty(rows.shape[0], weight.shape[0])
    total: Tensor | None = None
    with torch.autocast(rows.device.type, enabled=False):
        for part, band in noisy(weight, scale, key, rows.dtype):
            if across:
                torch.mm(rows, band.t(), out=found[:, part])
                continue
            piece = (rows[:, part] @ band).to(wide(rows))
            total = piece if total is None else total.add_(piece)
    return found if total is None else total.to(rows.dtype)
