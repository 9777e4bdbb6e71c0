"""Saved activations in 8 or 4 bits. ActNN, arXiv 2104.14129; GACT, arXiv 2206.11357.

What an operation keeps for backward is stored, per group of channels with the range [l, l + L s],
L = 2^bits - 1, as

    q = floor((x - l) / s + u),    x' = l + s q,    u uniform in [0, 1):    E[x'] = x

so a Linear's weight gradient g^T x' is right on average, and its dx = g W does not change at all.
Gradients through products, activations, norms and attention read x' where they read x and become
approximate. Masks (dropout, and the sign that ReLU needs) take one bit and stay exact. The forward
does not change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from surgery.passkit import (
    EVERY,
    CaptureError,
    Counting,
    Packer,
    Saved,
    Targets,
    Wrapper,
    check_types,
    is_by_identity,
    matched,
    module_of,
    name_of,
    noise,
    register,
    writes,
)

SMALLEST = 1024  # bytes of an activation: below, codes and ranges would save next to nothing


TABLE = 1 << 16  # random numbers, drawn once a step


SIGNS, MASKS = frozenset(["relu", "relu_"]), frozenset(["dropout"])


@register("compress")
@dataclass(frozen=True, kw_only=True)
class Compress:
    """Options of compress.

    bits: the size of a packed entry, 8 or 4. targets: the modules whose operations keep packed
    activations, by PEFT's matching rules (default: all). An activation that another operation keeps
    as well is not packed.
    """

    saves = ("activations",)

    bits: Literal[4, 8] = 8
    targets: Targets = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)

    def start(self, model: nn.Module) -> Compression:
        """Return the state of the pass on a model; changes nothing. Raises TargetError."""
        modules = None if self.targets is None else matched(model, self.targets, "targets")
        return Compression(options=self, modules=modules)


@dataclass(eq=False, kw_only=True)
class Compression(Counting):
    options: Compress
    modules: set[str] | None  # whose operations are targeted
    name: str = "compress"
    after = (EVERY, "recompute")  # works on how things are kept, once it is known what is
    packed: int = 0  # activations, of all captured graphs
    masks: int = 0
    tables: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"tables": {}}

    def rewrite(self, graph: GraphModule, inputs: Sequence[Any], saved: Saved) -> None:
        """Pack what one captured graph keeps, checkpointed bodies included, in place."""
        for _, inner in saved.inner():
            self.rewrite(inner.module, inner.inputs, inner)
            inner.module.recompile()
        chosen = self._chosen(saved)
        self.packed += len(chosen)
        wrapper = Wrapper(graph, saved, chosen)
        wrapped = 0
        for node in list(graph.graph.nodes):
            own, called = saved.saves.get(node, set()), name_of(node)
            is_mask = bool(own) and called in SIGNS | MASKS and self.takes(node)
            if is_mask or own & chosen:
                self.masks += is_mask
                wrapped += 1
                key = f"{module_of(node)} {called} {wrapped}"  # a node's name differs by capture
                packer = Packer(
                    bits=self.options.bits,
                    random=partial(self.random, key),
                    sign=called in SIGNS,
                    mask=called in MASKS,
                )
                wrapper.wrap(node, packer)

    def _chosen(self, saved: Saved) -> set[int]:
        """Return the storages of activations that only operations of ours keep."""
        made = {
            storage
            for node, storages in saved.outputs.items()
            for storage in storages
            if _is_activation(saved.env.get(node))
        }
        wanted = {
            storage
            for storage, keepers in saved.keepers.items()
            if saved.size[storage] >= SMALLEST
            and all(self.takes(node) for node in keepers)
            and not all(name_of(node) in SIGNS for node in keepers)
        }
        return (wanted & made) - saved.written - saved.free

    def takes(self, node: Node) -> bool:
        """Whether an operation is one of those that keep packed activations."""
        if not name_of(node) or is_by_identity(node) or writes(node):
            return False
        if self.modules is None:
            return True
        parts = module_of(node).split(".")
        return any(".".join(parts[: i + 1]) in self.modules for i in range(len(parts)))

    def random(self, key: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return 2^15 uniform numbers in [0, 1) and more, for rows and columns in this step."""
        table = self.tables.get((self.step, device))
        if table is None:
            words = noise.words(TABLE, self.options.seed, "compress", self.step, device=device)
            table = (words >> 8) * 2.0**-24
            self.tables = {(self.step, device): table}
        starts = (noise.bits(self.options.seed, key, side) for side in ("rows", "columns"))
        rows, columns = (table[start % (TABLE // 2) :] for start in starts)
        return rows, columns

    def check_reached(self) -> None:
        if not self.packed and not self.masks:
            raise CaptureError(
                "compress found no activation to pack: no activation is kept by the "
                "targeted operations alone. Leave targets= out, or leave compress out."
            )

    def lines(self) -> Iterable[tuple[str, str]]:
        bits = self.options.bits
        yield "packed", f"{self.packed} activations in {bits} bits, {self.masks} masks in 1"
        yield "exact", "the forward, dx of Linears, masks; all other gradients are approximate"


def _is_activation(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
