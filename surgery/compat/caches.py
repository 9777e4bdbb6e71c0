"""What torch keeps of a capture, and how to let go of it."""

from __future__ import annotations

import types
from collections.abc import Iterable

from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
from torch.fx.experimental.symbolic_shapes import ShapeEnv


def forget(code: types.CodeType, symbols: Iterable[ShapeEnv]) -> None:
    """Let go of what torch keeps of a capture, some of it for ever.

    Dynamo knows a code by what it made of it, which that code's own cache holds, and its guards by
    whatever function or class they look at. Results of fake operations are kept by the symbols of a
    capture, and these, with all fake tensors, by caches of what they were asked, which are those of
    the class. 1.2 MB for each capture of a small model.
    """
    guards = [entry.guard_manager for entry in _debug_get_cache_entry_list(code)]
    reset_code(code)
    for each in guards:
        vars(each).clear()
        each.cache_entry = each.extra_state = None  # what is asked when that is deallocated
    for each in symbols:
        each.fake_tensor_cache.clear()
        each.tracked_fakes = []  # whose sizes lead back to it, a circle that C++ hides from Python
    for each in vars(ShapeEnv).values():
        if hasattr(each, "cache_clear"):
            each.cache_clear()
