"""Hooks of an optimizer's own: which is called first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def hear_first(optimizer: Any, hook: Callable[..., None]) -> None:
    """Let an optimizer of torch's kind call a hook after its steps, before all others; once."""
    hooks = getattr(optimizer, "_optimizer_step_post_hooks", None)
    if hooks is None or hook in hooks.values():
        return
    hooks.move_to_end(optimizer.register_step_post_hook(hook).id, last=False)
