"""Reading the outputs of chosen blocks, and changing that of the last of them, by hooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from surgery.errors import ModelError, OptionError, TargetError
from surgery.weights.additions import Addition
from surgery.weights.targets import blocks


class Taps(Addition):
    """An addition that reads the outputs of k blocks and replaces the last of them.

    Its forward gets the detached outputs h_1 .. h_k (..., hidden), and returns what the next block
    reads instead of h_k. made_by: the name of the pass, for errors. reads: the names of the blocks,
    in order. hidden: the width of h.
    """

    made_by: ClassVar[str]

    def __init__(self, reads: Sequence[str], hidden: int) -> None:
        super().__init__()
        self.reads, self.hidden = list(reads), hidden
        self.seen: list[Tensor] = []

    def hook(self, model: nn.Module) -> Iterator[RemovableHandle]:
        yield model.get_submodule(self.reads[0]).register_forward_pre_hook(self.open)
        for name in self.reads[:-1]:
            yield model.get_submodule(name).register_forward_hook(self.hear)
        yield model.get_submodule(self.reads[-1]).register_forward_hook(self.close)

    def open(self, block: nn.Module, inputs: Any) -> None:
        """Forget a forward that has ended in an error. Runs before the first block that is read."""
        self.seen = []

    def hear(self, block: nn.Module, inputs: Any, output: Any) -> None:
        """Keep the output of a block for this forward. Runs after each block that is read."""
        if not self.resting:
            self.seen = [*self.seen, _first(output).detach()]

    def close(self, block: nn.Module, inputs: Any, output: Any) -> Any:
        """Return what the next block reads. Runs after the last block that is read."""
        if self.resting:
            return None
        last = _first(output).detach()
        seen, self.seen = [*self.seen, last], []
        if len(seen) != len(self.reads):
            raise ModelError(
                f"{self.made_by}: {len(seen)} of the {len(self.reads)} blocks that the side path "
                "reads have run in this forward. A checkpoint around a block runs it and its hooks "
                "again by themselves: switch gradient checkpointing off, since a frozen trunk "
                "keeps nothing for backward. And do not drop blocks."
            )
        if last.shape[-1] != self.hidden:
            raise ModelError(
                f"{self.made_by}: {self.reads[-1]} returns the shape {tuple(last.shape)}, but the "
                f"side path was made for a width of {self.hidden}. Give hidden={last.shape[-1]}."
            )
        found = self(seen)
        return found if isinstance(output, Tensor) else (found, *output[1:])


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def evenly(names: Sequence[str], count: int) -> list[str]:
    """Return `count` of the names, evenly spaced and with the last one; all if there are fewer."""
    count = min(count, len(names))
    return [names[(i + 1) * len(names) // count - 1] for i in range(count)]


def one_stack(model: nn.Module, within: str | None, of: str) -> list[str]:
    """Return the names of the blocks of one list, in order.

    within: the name of the list; None if there is only one. of: the name of the pass, for errors.
    Raises TargetError if the list does not exist, or if None leaves it open which one is meant.
    """
    lists: dict[str, list[str]] = {}
    for name in blocks(model):
        lists.setdefault(name.rpartition(".")[0], []).append(name)
    if within is not None and within not in lists:
        raise TargetError(f"{of}: within={within!r} is not one of the lists of blocks: {[*lists]}.")
    if within is None and len(lists) != 1:
        raise TargetError(
            f"{of}: the blocks of this model are in {len(lists)} lists, {[*lists][:4]}. Say which "
            f"one is meant: within={next(iter(lists))!r}."
        )
    return lists[within or next(iter(lists))]


def width_of(block: nn.Module, of: str) -> int:
    """Return the width of a block's input, which is that of the outermost norm in the block.

    of: the name of the pass, for errors. Raises OptionError if the block has no norm.
    """
    found = sorted(block.named_modules(), key=lambda each: each[0].count("."))
    sizes = [
        weight.numel()
        for _, module in found
        if "norm" in type(module).__name__.lower()
        if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.ndim == 1
    ]
    if not sizes:
        raise OptionError(
            f"{of}: {type(block).__name__} has no norm that shows the width of the model. Give the "
            "width: hidden=..."
        )
    return sizes[0]
