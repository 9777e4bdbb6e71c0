"""What is compiled in a step that is played: not compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from surgery.compat.stage import current


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run what torch.compile was asked for as it is written: machine code needs memory. A function
    that is compiled inside, as torchao's optimizers do, is one launch each time."""
    compile = torch.compile

    def written(model: Any = None, **options: Any) -> Any:
        if model is None:
            return partial(written, **options)
        stage = current()
        if stage is None or isinstance(model, torch.nn.Module):
            return model
        return partial(stage.launch, model)

    torch.compile = written
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.compile = compile
