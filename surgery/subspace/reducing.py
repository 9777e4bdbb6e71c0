"""Coordinates on one side of a weight: W + scale P R or W + scale R P^T, their gradients from g and
x alone, and the x of the Linear kept as ever."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.graph.reduced import Reduction


class OneSided(Reduction, ABC):
    """P beside one weight; also the `Map` of its coordinate R.

    left: whether P is on the side of the outputs: P (out, r) and R (r, in); else P (in, r) and
    R (out, r). channels: the rows of P, out or in. scale: a factor of the steps. matrix: P; None
    until the first gradient has been reduced.
    """

    name: str
    left: bool
    channels: int
    scale: float
    matrix: Tensor | None

    @abstractmethod
    def frame_for(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return P for the gradient grad^T x that is about to be reduced."""

    def gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return d loss / dR, scale (g P)^T x or scale g^T (x P)."""
        p = (self.frame_for(grad, x) * self.scale).to(grad)
        return (grad @ p).t() @ x if self.left else grad.t() @ (x @ p)

    def expand(self, delta: Tensor) -> Tensor:
        """Return the whole change (out, in) that a change of R stands for."""
        return _product(delta, delta, self._frame(delta), self.left, self.scale)

    def change(self, delta: Tensor, part: slice) -> Tensor:
        """Return these rows of `expand(delta)`."""
        if not self.left:
            return self.expand(delta[part])
        return _product(delta, delta, self._frame(delta)[part], True, self.scale)

    def adjoint(self, gradient: Tensor) -> Tensor:
        """Return R's gradient, given the whole one (out, in)."""
        unit = torch.eye(gradient.shape[0], dtype=gradient.dtype, device=gradient.device)
        p = (self.frame_for(unit, gradient) * self.scale).to(gradient)
        return p.t() @ gradient if self.left else gradient @ p

    def pure(self) -> tuple[Any, ...] | None:
        """Return `expand` as a pure function, see `Map.pure`."""
        return None if self.matrix is None else (_product, self.matrix, self.left, self.scale)

    def _frame(self, delta: Tensor) -> Tensor:
        if self.matrix is not None:
            return self.matrix
        if not delta.is_meta and bool(delta.any()):
            raise SurgeryError(
                f"{self.by}: P of {self.name} is computed from its first gradient, which has not "
                "been seen yet. Run a backward first."
            )
        return delta.new_zeros(self.channels, delta.shape[0 if self.left else 1])

    def add_into(self, matrix: Tensor, delta: Tensor) -> None:
        """Add `expand(delta)` to the weight's matrix (out, in), of the same dtype, in place."""
        p = self._frame(delta).to(delta)
        first, second = (p, delta) if self.left else (delta, p.t())
        matrix.addmm_(first, second, alpha=self.scale)


def _product(_: Tensor, delta: Tensor, p: Tensor, left: bool, scale: float) -> Tensor:
    p = p.to(delta) * scale
    return p @ delta if left else delta @ p.t()
