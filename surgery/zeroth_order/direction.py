"""What a weight is moved by in a two-point evaluation: z, drawn again wherever it is needed.

Nothing of a weight's size is kept: forward reads W + s z from a tensor that lives for one
operation (or takes s x z^T from thin factors), and the optimizer's step adds a z in one sweep. On a
CPU that goes in bands, each drawn while it is in the cache; on an accelerator in one launch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from surgery import noise
from surgery.compat.modules import held
from surgery.compat.tensors import off_stage
from surgery.graph.linear import rows_of
from surgery.kernels import directions, plan
from surgery.kernels.fused import launch
from surgery.weights.coordinate import Beside, Coordinate
from surgery.weights.matrices import matrix_of, matrix_shape, wide
from surgery.weights.shards import is_cut


class Probe(Protocol):
    """What is being evaluated now, of all weights. step: optimizer steps made. slot: number of the
    direction. shift: the factor s of z; a tensor with a tangent in forward mode; None for W."""

    seed: int
    kind: directions.Kind
    step: int
    slot: int
    shift: float | Tensor | None

    @property
    def scale(self) -> float:
        """1 / sqrt(number of directions): coordinates a stand for the change scale * sum a z."""
        ...

    @property
    def slots(self) -> int:
        """The number of directions, of all ranks."""
        ...

    def probes(self, group: int, slot: int) -> bool:
        """Whether a direction of this step goes through the weights of a group."""
        ...


@dataclass(eq=False, kw_only=True)
class Perturbation(Beside):
    """The direction z of one weight, with entries of variance 1: the map of the K scalars."""

    name: str
    owner: nn.Module
    probe: Probe
    group: int = 0  # of weights that are probed together
    transposed: bool = False  # z has the layout of the weight

    @property
    def slots(self) -> list[int]:
        """The directions of this step in which z is not zero."""
        return [slot for slot in range(self.probe.slots) if self.probe.probes(self.group, slot)]

    @property
    def is_probed(self) -> bool:
        """Whether the current direction perturbs the weight."""
        return self.probe.probes(self.group, self.probe.slot)

    def current(self) -> Tensor:
        """Return the weight, which no evaluation changes."""
        weight = held(self.owner, self.name.rpartition(".")[2])
        assert weight is not None
        return weight.detach()

    def key(self, slot: int, *labels: str | int) -> int:
        """Return the key of a direction: an entry of z depends on the key and its place only."""
        bits = noise.bits(self.probe.seed, "z", self.name, self.probe.step, slot, *labels)
        return directions.signed(bits)

    def rows(self, slot: int, part: slice) -> Tensor:
        """Return rows of z as a matrix (n, width), at least float32."""
        weight = self.current()
        height, width = matrix_shape(weight)
        start, stop, _ = part.indices(height)
        count = (stop - start) * width
        key, device = self.key(slot), weight.device
        z = directions.direction(self.probe.kind, start * width, count, key, device)
        return rearrange(z, "(row column) -> row column", column=width)

    def gather(self, slot: int, ids: Tensor) -> Tensor:
        """Return the rows of z with these numbers (n,)."""
        width = self.current().shape[-1]
        places = ids[:, None] * width + torch.arange(width, device=ids.device)
        return directions.direction_at(self.probe.kind, places, self.key(slot))

    def mask(self) -> tuple[directions.Mask | None, tuple[Any, ...]]:
        """Return a function that puts zeros into z, with its arguments after the first three."""
        return None, ()

    def drawn(self, slot: int) -> tuple[Any, ...] | None:
        """Return what kernels draw z from, see `directions.whole`; None: it is formed in bands."""
        weight = self.current()
        if not plan.plan_of(weight.device).whole or is_cut(weight):
            return None
        kind, (mask, more) = self.probe.kind, self.mask()
        table = directions.table_of(kind, weight.device)
        return self.key(slot), kind, table, mask, *more

    def perturbed(self, dtype: torch.dtype) -> Tensor:
        """Return W + s z, added in float32 (float64) and rounded once to the dtype."""
        weight, shift = self.current(), self.probe.shift
        if shift is None:
            return weight.to(dtype)
        slot, source = self.probe.slot, matrix_of(weight)
        drawn = None if isinstance(shift, Tensor) else self.drawn(slot)
        if drawn is not None:
            assert isinstance(shift, float)
            return launch(directions.moved, weight, number(shift, weight), dtype, *drawn)
        if isinstance(shift, Tensor):
            z = self.rows(slot, slice(None)).view(weight.shape).to(dtype)
            return weight.to(dtype) + shift.to(dtype) * z
        result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        target = matrix_of(result)
        for part in parts(source):
            torch.add(source[part], self.rows(slot, part), alpha=shift, out=target[part])
        return result

    def perturbed_rows(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Return rows (n, width) of the weight plus s z of these rows. ids: their numbers (n,).

        `rows` may be overwritten.
        """
        shift, slot = self.probe.shift, self.probe.slot
        assert isinstance(shift, float)
        drawn = self.drawn(slot)
        if drawn is not None:
            args = (rows, ids, self.current(), number(shift, rows))
            return launch(directions.rows_moved, *args, *drawn)
        for part in parts(rows):
            torch.add(rows[part], self.gather(slot, ids[part]), alpha=shift, out=rows[part])
        return rows

    def forget(self) -> None:
        """Free what was kept for the step that has been made."""

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs and cannot draw again."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""
        self.forget()

    def multiply(self, x: Tensor, transposed: bool, bias: Tensor | None) -> Tensor:
        """Return x (W + s z)^T + b, or x (W + s z) + b if transposed."""
        weight, shift = self.current(), self.probe.shift
        cast = torch.is_autocast_enabled(weight.device.type)
        whole = plan.plan_of(weight.device).whole
        if shift is None or isinstance(shift, Tensor) or transposed or cast or whole:
            moved = self.perturbed(weight.dtype)
            return functional.linear(x, moved.t() if transposed else moved, bias)
        # In bands, each used while it is in the cache: no copy of the weight ever stands whole.
        rows = rows_of(x)
        result = rows.new_empty(rows.shape[0], weight.shape[0])
        for part in parts(weight):
            torch.mm(rows, self._band(weight, part, shift).t(), out=result[:, part])
        if bias is not None:
            result += bias
        return result.unflatten(0, x.shape[:-1])

    def _band(self, matrix: Tensor, part: slice, shift: float) -> Tensor:
        z = self.rows(self.probe.slot, part)
        room = z if z.dtype == wide(matrix) else None  # z is in the cache already
        return torch.add(matrix[part], z, alpha=shift, out=room).to(matrix.dtype)

    # -- the map of the coordinates ----------------------------------------------------------------

    def change(self, delta: Tensor, part: slice) -> Tensor:
        weight = self.current()
        height, width = matrix_shape(weight)
        count = len(range(*part.indices(height)))
        total = torch.zeros(count, width, dtype=delta.dtype, device=weight.device)
        values = delta.tolist()
        for slot in self.slots:
            if values[slot]:
                total.add_(self.rows(slot, part), alpha=values[slot] * self.probe.scale)
        return total

    def pure(self) -> tuple[Any, ...] | None:
        drawn = {slot: self.drawn(slot) for slot in self.slots}
        keys = tuple(each[0] for each in drawn.values() if each is not None)
        first = next(iter(drawn.values()), None)
        if first is None:
            return None
        return directions.summed, *self.factors_of(drawn), keys, *first[1:]

    def factors_of(self, slots: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Return the factor of all scalars, and the places of some of them, as tensors."""
        weight = self.current()
        return number(self.probe.scale, weight), _places(tuple(slots), weight.device)

    def expand(self, delta: Tensor) -> Tensor:
        return self.change(delta, slice(None))

    def adjoint(self, gradient: Tensor) -> Tensor | None:
        """Return None: the slope of a penalty belongs to what the model returns."""
        return None

    def add_into(self, matrix: Tensor, delta: Tensor) -> None:
        own = delta.tolist()
        values = {slot: own[slot] * self.probe.scale for slot in self.slots if own[slot]}
        for part in parts(matrix) if values else ():
            if len(values) == 1:
                ((slot, value),) = values.items()
                matrix[part].add_(self.rows(slot, part), alpha=value)
            else:  # all z of W before any is added: a mask depends on it
                matrix[part] += self.change(delta, part)


def perturbation_of(coordinate: Coordinate) -> Perturbation:
    """Return what stands beside a weight."""
    assert isinstance(coordinate.beside, Perturbation)
    return coordinate.beside


def parts(matrix: Tensor) -> Iterable[slice]:
    """Cut a matrix into bands of rows that stay in the cache, on a CPU."""
    height, width = matrix.shape
    return plan.bands(height, width, plan.plan_of(matrix.device).drawn)


def number(value: float, like: Tensor) -> Tensor:
    """Return a number as a scalar tensor on another one's device, in the dtype of its steps."""
    return _number(value, wide(like), like.device)


@lru_cache(maxsize=64)
def _places(slots: tuple[int, ...], device: torch.device) -> Tensor:
    with off_stage():
        return torch.tensor(slots, device=device)


@lru_cache(maxsize=4096)
def _number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with off_stage():
        return torch.full((), value, dtype=dtype, device=device)
