"""One forward run several times from the same state, and what of its outputs carries a gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, get_rng_state, nn, set_rng_state
from torch.utils.checkpoint import get_device_states, set_device_states

from surgery.compat.tensors import flatten, unflatten
from surgery.errors import ModelError

Modes: TypeAlias = tuple[bool, ...]  # train or eval, of each module


@dataclass(eq=False)
class Same:
    """Runs a forward again and again from the same state: generators, buffers.

    After the last run the generators are where one forward leaves them; buffers are untouched
    until `keep`. written: what buffers a forward writes, by the modes of the modules; filled as
    they are seen. first: what the first run wrote.
    """

    forward: Callable[[], Any]
    model: nn.Module
    written: dict[Modes, frozenset[str]]
    generators: Any = None
    first: dict[str, Tensor] | None = None

    def keep(self) -> None:
        """Let the buffers be what the first run made of them: statistics move once a batch."""
        named = dict(self.model.named_buffers())
        for name, value in (self.first or {}).items():
            named[name].copy_(value)

    def last(self) -> Any:
        """Run it for the last time, as any forward: buffers are as it leaves them."""
        self._begin()
        return self.forward()

    def _begin(self) -> None:
        if self.generators is None:
            self.generators = get_rng_state(), get_device_states(*self.model.parameters())
        else:
            set_rng_state(self.generators[0])
            set_device_states(*self.generators[1])

    def __call__(self) -> Any:
        self._begin()
        modes = tuple(module.training for module in self.model.modules())
        named, known = dict(self.model.named_buffers()), self.written.get(modes)
        held = {n: b.clone() for n, b in named.items() if known is None or n in known}
        done = False
        try:
            result = self.forward()
            done = True
            return result
        finally:
            # Batch norm writes without raising the version of its buffers: compare what they hold.
            changed = {name for name, before in held.items() if not named[name].equal(before)}
            if self.first is None and done:
                self.first = {name: named[name].clone() for name in changed}
            for name in changed:
                named[name].copy_(held[name])
            if known is None and done:
                self.written[modes] = frozenset(changed)


class Output:
    """What a forward returned. values: the floating tensors that carry the gradient; if there is a
    loss, only it does, so that of two outputs only one has its logits kept."""

    def __init__(self, output: Any) -> None:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        self.loss = isinstance(loss, Tensor) and loss.is_floating_point()
        leaves, self.tree = flatten(output)
        self.places = [
            i
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
            if not self.loss or leaf is loss
        ]
        if not self.places:
            raise ModelError(
                f"the output of the model, a {type(output).__name__}, has no floating tensor that "
                "a loss could be computed from."
            )
        self.values: list[Tensor] = [leaves[i] for i in self.places]
        self.slopes: list[Tensor] = []
        self.leaves = leaves

    @property
    def is_loss(self) -> bool:
        """Whether what carries the gradient is one number, the loss."""
        return len(self.values) == 1 and self.values[0].ndim == 0

    def with_values(self, values: Sequence[Tensor]) -> Any:
        """Return the output with other tensors in the place of its values."""
        for place, value in zip(self.places, values, strict=True):
            self.leaves[place] = value
        return unflatten(self.leaves, self.tree)
