"""Zeroth-order runs as lists of scalars: the journal of a run, and taking its steps again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from surgery.engine.finding import applied
from surgery.engine.surgery import Surgery
from surgery.errors import ModelError, listed
from surgery.weights.carry import carry
from surgery.zeroth_order.method import TwoPoint


def journal(model: nn.Module) -> Tensor:
    """Return all steps of a zeroth-order run, float64 (steps, K + 1).

    A step consists of K scalars and the learning rate. Together with the options of the pass, the
    steps describe the whole run; see `replay`. Raises ModelError if the model is not trained by
    such a pass.
    """
    method = _method(applied(model))
    return torch.tensor(method.journal, dtype=torch.float64).view(-1, _scalars(method) + 1)


@torch.no_grad()
def replay(model: nn.Module, steps: Tensor) -> nn.Module:
    """Repeat the steps of a journal (steps, K + 1) without any forward. Returns the same model.

    On a CPU, the model's weights are then those of the run, bit for bit. model: a model with the
    weights that the run started from, and the same pass applied with the same options. Raises
    ModelError if the model has made steps already, or if the journal has another number of
    directions.
    """
    surgery = applied(model)
    method = _method(surgery)
    count = _scalars(method)
    made = surgery.clock.step
    if made:
        raise ModelError(
            f"the model has made {made} steps already. Replay into the weights that the "
            f'run started from: surgery.apply(model, "{method.name}", ...), then surgery.replay.'
        )
    if steps.ndim != 2 or steps.shape[1] != count + 1:
        raise ModelError(
            f"a journal of shape {tuple(steps.shape)} does not fit {method.name} with {count} "
            f"directions: expected (steps, {count + 1})."
        )
    surgery.bind()
    for *scalars, rate in steps.tolist():
        for site in surgery.decision.sites:
            each = site.coordinates[0]
            assert each.mapped is not None
            now = torch.tensor(scalars, dtype=each.parameter.dtype)
            decay = rate * each.mapped.weight_decay
            carry(each, site.current(), None, now, surgery.clock.step, decay)
        method.journal.append((*scalars, rate))
        surgery.clock.resume(surgery.clock.step + 1)
        method.advance()
    return model


def _scalars(method: TwoPoint) -> int:
    return method.weights[0].parameter.numel()


def _method(surgery: Surgery) -> TwoPoint:
    for method in surgery.decision.methods:
        if isinstance(method, TwoPoint) and not method.dense:
            others = {each.weight for each in surgery.decision.coordinates}
            others -= {each.weight for each in method.weights}
            if not others:
                return method
            raise ModelError(
                f"{listed(sorted(others))} are trained by backward beside {method.name}, so its "
                "scalars are not the whole run. Use surgery.save(model, folder, optimizer)."
            )
    names = ", ".join(options.name for options in surgery.decision.passes)
    raise ModelError(
        f"only the steps of zeroth-order passes are scalars, but {names} was applied (dense=True "
        "leaves the steps to the optimizer)."
    )
