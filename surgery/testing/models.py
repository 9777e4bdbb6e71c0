"""A small model of a user's own kind, and batches for it: no config, tied first and last weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block with a norm and two Linears."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Tiny(nn.Module):
    """A language model of three blocks; forward returns the loss of tokens (rows, length)."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


def tiny() -> nn.Module:
    """Return a `Tiny` in training mode, the same in each call."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Tiny().train()


def tokens(seed: int = 1, rows: int = 2) -> dict[str, Tensor]:
    """Return a batch for `Tiny`, drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, 32, (rows, 6), generator=generator)
    return {"tokens": found, "targets": found}
