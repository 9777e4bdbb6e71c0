"""Dynamic embedding pruning: train the rows of a vocabulary that a corpus uses. arXiv 2309.08708.

With I the ids that occur in the data, the embedding E (V, d) gets gradients in E[I] only: what the
optimizer sees is

    S = E[I] (k, d),    E[I] <- S after each step,    y = E[ids] = S[place of ids in I]

and gradients and optimizer state have k rows instead of V. A head over the vocabulary, tied or not,
reads all rows, so that its softmax is exact, and is trained in those of I. The model keeps its
whole E, current at every step: tokenizer, checkpoints and generation work as before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from surgery.passkit import (
    CaptureError,
    Coordinate,
    Method,
    Rows,
    Run,
    Saved,
    TargetError,
    check_types,
    demand,
    densely,
    input_embeddings,
    listed,
    look_up_rows,
    output_head,
    register,
    rows_coordinate,
)


@register("trim")
@dataclass(frozen=True, kw_only=True, repr=False)
class Trim:
    """Options of trim.

    used: the ids that occur in the data: numbers, a tensor, or a data set of mappings (of which
    "input_ids", "labels" and "decoder_input_ids" are read) or of sequences of ids. Any other id is
    an error in training. rest: whether all other weights are trained too, as without surgery; if
    False, other passes train them, or nothing does.
    """

    saves = ("gradients", "optimizer")

    used: Any = ()
    rest: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "used", tuple(sorted(_ids(self.used))))
        check_types(self)

    def __repr__(self) -> str:
        return f"Trim(used=<{len(self.used):,} ids>, rest={self.rest})"

    def start(self, model: nn.Module) -> Trimming:
        """Find the tables of a model; changes nothing. Raises OptionError, TargetError."""
        demand(bool(self.used), self, "used= has no ids. Give those of your data: used=dataset.")
        table = input_embeddings(model)
        found = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        table = found[0] if table is None and len(found) == 1 else table
        names = {id(p): name for name, p in model.named_parameters()}
        weight = getattr(table, "weight", None)
        if not isinstance(weight, Tensor) or id(weight) not in names:
            raise TargetError(
                "trim: it is not clear which embedding of this model is that of its vocabulary. "
                "Give the model a method get_input_embeddings(), as transformers' models have."
            )
        height = weight.shape[0]
        strange = [n for n in self.used if not 0 <= n < height]
        outside = f"used= has {listed(map(str, strange))}, but the vocabulary has {height:,} rows."
        demand(not strange, self, outside)
        head = getattr(output_head(model), "weight", None)
        tables = [weight]
        if isinstance(head, Tensor) and head is not weight and head.shape[0] == height:
            tables.append(head)
        tables = [each for each in tables if each.requires_grad]
        config = getattr(model, "config", None)
        makes = getattr(config, "is_encoder_decoder", False)  # ids of its own, from labels
        own_ids = ("decoder_start_token_id", "pad_token_id") if makes else ()
        given = [getattr(config, key, None) for key in own_ids]
        given = [each for each in (getattr(table, "padding_idx", None), *given) if each is not None]
        rows = [*self.used, *given]
        own = [rows_coordinate(model, names[id(each)], rows) for each in tables]
        others = [n for n, p in model.named_parameters() if p.requires_grad]
        others = [n for n in others if n not in {each.weight for each in own}] if self.rest else []
        rest = densely(model, others, precision="weights")
        if not own:
            raise TargetError(
                f"trim: {names[id(weight)]} is frozen, so there are no rows to train. Unfreeze it "
                "(requires_grad=True) before surgery.apply, or leave trim out."
            )
        return Trimming(
            tables=own,
            rest=rest,
            looked=names[id(weight)] if weight.requires_grad else None,
            scores=isinstance(head, Tensor) and head.shape[0] == height and head.requires_grad,
            height=height,
        )


@dataclass(eq=False, kw_only=True)
class Trimming(Method):
    """tables: rows of the embedding and of an untied head. looked: name of the embedding. scores:
    whether a head over the vocabulary is among them. height: of the vocabulary."""

    name: str = "trim"
    tables: list[Coordinate]
    rest: list[Coordinate]
    looked: str | None
    scores: bool
    height: int
    reached: set[str] = field(default_factory=set)
    after: ClassVar = ("chunked_loss",)

    @property
    def coordinates(self) -> Sequence[Coordinate]:
        return [*self.tables, *self.rest]

    def rewrite(self, graph: GraphModule, inputs: Sequence[Any], saved: Saved) -> None:
        self.reached |= look_up_rows(graph, inputs)

    def check_reached(self) -> None:
        if self.looked is not None and self.looked not in self.reached:
            raise CaptureError(
                f"trim: the captured forward has no embedding(ids, {self.looked}) outside of "
                "checkpointed regions, so an id that is not among used= would go unnoticed. Leave "
                "trim out."
            )

    def before_forward(self, arguments: Mapping[str, Any], run: Run) -> None:
        rows = self.tables[0].index if self.tables else None
        if self.looked is None or not self.scores or not isinstance(rows, Rows):
            return
        names = [name for name in arguments if "label" in name or "target" in name]
        given = [v for name in names if isinstance(v := arguments[name], Tensor)]
        rows.labels[:] = [value for value in given if value.dtype == torch.long]

    def lines(self) -> Iterable[tuple[str, str]]:
        if not self.tables:
            yield "rows", "none: the table is frozen"
        for each in self.tables:
            rows = each.parameter.shape[0]
            yield each.weight, f"{rows:,} of {self.height:,} rows trained, {rows / self.height:.1%}"


def _ids(data: Any) -> set[int]:
    """Return the ids of a tensor, of numbers, or of a data set."""
    if isinstance(data, Tensor):
        return {n for n in data.unique().tolist() if n >= 0}
    if isinstance(data, Mapping):
        fields = ("input_ids", "labels", "decoder_input_ids")
        there = [name for name in fields if name in data]
        return set().union(*(_ids(data[name]) for name in there))
    if isinstance(data, int) and not isinstance(data, bool):
        return {data} if data >= 0 else set()
    if isinstance(data, str) or not isinstance(data, Iterable):
        return set()
    found: set[int] = set()
    for each in data:
        if type(each) is int:
            found.add(each)
        else:
            found |= _ids(each)
    return {n for n in found if n >= 0}
