"""A whole step played on tensors without memory: each storage as it comes and goes.

Storages of such tensors are freed as those of real ones are, when the last reference is gone,
autograd's own included: what is alive is counted, not predicted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch._C import DispatchKey  # pyright: ignore[reportPrivateImportUsage]
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from surgery.compat.fsdp import held_of
from surgery.compat.hf import fakes_taken_for_real
from surgery.compat.known import Known
from surgery.compat.tensors import is_fake, playing

T = TypeVar("T")

aten = torch.ops.aten
# What only data could tell. A finite, positive number lets every check pass; one less it is none.
_ANSWERS: dict[Any, Callable[[Any], Any]] = {
    aten._local_scalar_dense.default: lambda t: _one(t.dtype),
    aten.equal.default: lambda t: True,
}


def _grouped_mm(a: Tensor, b: Tensor, *args: Any, **options: Any) -> Tensor:
    """A CPU takes any floating dtype; what torch knows of its shapes, bfloat16 alone."""
    like = aten._grouped_mm.default(a.bfloat16(), b.bfloat16(), *args, **options)
    return torch.empty_strided(like.shape, like.stride(), dtype=a.dtype, device=a.device)


_STAND_INS: dict[Any, Callable[..., Any]] = {aten._grouped_mm.default: _grouped_mm}
# Written in other operations, whose results are in memory for a while: dequantised weights.
_OF_OTHERS = {"bitsandbytes::gemm_4bit"}


class Watcher(Protocol):
    """Who is told what happens on a stage."""

    def came(self, key: int, size: int, operation: str) -> None:
        """A storage of so many bytes was allocated by an operation."""
        ...

    def went(self, key: int) -> None:
        """It was freed."""
        ...

    def opened(self) -> None:
        """A function that is one launch begins."""
        ...

    def closed(self) -> None:
        """It has ended: what came and went meanwhile was never in memory."""
        ...

    def ran(
        self, operation: str, flops: int, dtype: torch.dtype, traffic: int, compiled: bool
    ) -> None:
        """An operation ran. flops: of products, 0 for all else. dtype: of its first tensor.
        traffic: bytes of what it read and wrote. compiled: it is a function that is one launch."""
        ...


class Stage(TorchDispatchMode):
    """Where every tensor has a shape, a dtype and a storage, and no memory."""

    def __init__(self, watcher: Watcher) -> None:
        super().__init__()
        self.watcher = watcher
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.keys: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.sizes: dict[int, int | None] = {}  # bytes told of; None: given back
        self.next = 0
        self.depth = 0  # inside of functions that run as one launch
        self.inside = 0  # floating-point operations of products in there
        self.results: dict[object, tuple[Callable[[], Any] | None, int]] = {}
        self.known = Known()

    def ignore_compile_internals(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Let Dynamo capture, and run what it has captured."""
        return True

    def key_of(self, t: Tensor) -> int:
        """Return what tells a tensor's storage from every other of this stage."""
        return self.see(held_of(t), "given")

    def see(self, t: Tensor, operation: str) -> int:
        storage = t.untyped_storage()
        key = self.keys.get(storage)
        if key is None:
            self.keys[storage] = key = self.next
            self.next += 1
            self.sizes[key] = storage.nbytes()
            # before `came`: an operation's error must not leave it alive
            weakref.finalize(storage, self._gone, key)
            self.watcher.came(key, storage.nbytes(), operation)
        return key

    def _gone(self, key: int) -> None:
        if self.sizes.pop(key) is not None:
            self.watcher.went(key)

    def resized(self, t: Tensor) -> None:
        """Note that the memory of a tensor was given back, or taken again."""
        key = self.keys.get(t.untyped_storage())
        if key is None:
            return
        size = t.untyped_storage().nbytes()
        if self.sizes[key] not in (size, None):
            self.sizes[key] = None
            self.watcher.went(key)
        if size and self.sizes[key] is None:
            self.sizes[key] = size
            self.watcher.came(key, size, "gathered")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        if any(map(_is_quantised, types)):
            return NotImplemented  # and what is made inside comes here
        if func.name() in _OF_OTHERS:
            with self:
                return func._op_dk(DispatchKey.CompositeExplicitAutograd, *args, **options)
        data = self.known.result(func, args, options)
        answer = _ANSWERS.get(func)
        if answer is not None and self._ours(args[0]):
            return answer(args[0]) if data is None else data
        run: Any = _STAND_INS.get(func, func)
        result = run(*args, **options)
        made = [t for t in pytree.tree_leaves(result) if self._ours(t)]
        if data is not None and len(made) == 1:
            self.known.note(made[0], data)
        known = [t.untyped_storage() in self.keys for t in made]
        for t in made:
            self.see(t, func.name())
        if self.depth:
            self.inside += _flops(func, args, options, result)
        elif not _moves_nothing(func, all(known)):
            given = [t for t in pytree.tree_leaves((args, options)) if self._ours(t)]
            self._tell(func.name(), _flops(func, args, options, result), given, made)
        return result

    def one(self, name: str, key: object, function: Callable[..., T], args: Sequence[Any]) -> T:
        """Return a function's result; its own temporaries stay in registers.

        key: tells what the function does. It is played once for arguments of these layouts.
        """
        given = [t for t in pytree.tree_leaves(args) if self._ours(t)]
        known = (key, *map(_layout, args))
        again, flops = self.results.get(known, (None, 0))
        if again is None:
            before, self.inside = self.inside, 0
            self.depth += 1
            self.watcher.opened()
            try:
                result = function(*args)
            finally:
                self.depth -= 1
                self.watcher.closed()
            flops, self.inside = self.inside, self.inside + before
            self.results[known] = _recipe(result, given), flops
        else:
            result = again()
        if not self.depth:
            made = [t for t in pytree.tree_leaves(result) if self._ours(t)]
            self._tell(name, flops, given, made, compiled=True)
        return result

    def launch(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        """Run a function as one launch; it is played each time, for what it does beside."""
        before, self.inside = self.inside, 0
        self.depth += 1
        self.watcher.opened()
        try:
            result = function(*args, **options)
        finally:
            self.depth -= 1
            self.watcher.closed()
            flops, self.inside = self.inside, self.inside + before
        if not self.depth:
            given, made = (
                [t for t in pytree.tree_leaves(tree) if self._ours(t)]
                for tree in ((args, options), result)
            )
            name = getattr(function, "__name__", "compiled")
            self._tell(name, flops, given, made, compiled=True)
        return result

    def _tell(
        self,
        name: str,
        flops: int,
        given: Sequence[Tensor],
        made: Sequence[Tensor],
        compiled: bool = False,
    ) -> None:
        tensors = [*given, *made]
        if tensors:
            traffic = sum(t.numel() * t.element_size() for t in tensors)
            self.watcher.ran(name, flops, tensors[0].dtype, traffic, compiled)

    def _ours(self, value: Any) -> bool:
        return isinstance(value, FakeTensor) and value.fake_mode is self.mode


_stage: ContextVar[Stage | None] = ContextVar("stage", default=None)


@contextmanager
def staged(stage: Stage) -> Iterator[None]:
    """Play what is run inside on a stage."""
    token = _stage.set(stage)
    try:
        with playing(stage.mode), fakes_taken_for_real(is_fake), stage:
            yield
    finally:
        _stage.reset(token)


def current() -> Stage | None:
    """Return the stage that we are on."""
    return _stage.get()


def place_in_forward() -> int:
    """Return a number that each autograd node made raises."""
    return torch.autograd._get_sequence_nr()  # pyright: ignore[reportPrivateImportUsage]


def place_in_backward() -> int | None:
    """Return the number, see `place_in_forward`, of the autograd node whose backward runs."""
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()


@cache
def _is_quantised(kind: type) -> bool:
    """Whether tensors of a class are made of others, as torchao's are; DTensor is known here."""
    return hasattr(kind, "__tensor_flatten__") and not issubclass(kind, (DTensor, FakeTensor))


def _layout(value: Any) -> object:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.stride()
    # Counts decide shapes; keys of draws, words of 32 bits, do not, and differ at each call.
    return int if type(value) is int and value >= 1 << 30 else repr(value)


def _recipe(result: Any, given: Sequence[Tensor]) -> Callable[[], Any] | None:
    """Return what makes the like of a result; None if it is not all new."""
    values, spec = pytree.tree_flatten(result)
    tensors = [t for t in values if isinstance(t, Tensor)]
    storages = {t.untyped_storage()._cdata for t in [*given, *tensors]}
    if len(storages) < len({id(t.untyped_storage()) for t in given}) + len(tensors):
        return None
    layouts = [
        partial(torch.empty_strided, tuple(t.shape), t.stride(), dtype=t.dtype, device=t.device)
        if isinstance(t, Tensor)
        else partial(_same, t)
        for t in values
    ]
    return lambda: pytree.tree_unflatten([make() for make in layouts], spec)


def _same(value: Any) -> Any:
    return value


def _one(dtype: torch.dtype) -> Any:
    if dtype == torch.bool:
        return True
    return 0.5 if dtype.is_floating_point else 1


def _moves_nothing(func: Any, known: bool) -> bool:
    """Whether an operation computes nothing: a view, an allocation."""
    if func.name() in ("aten::empty.memory_format", "aten::empty_strided", "aten::empty_like"):
        return True
    return known and not func._schema.is_mutable


def _flops(func: Any, args: Sequence[Any], options: dict[str, Any], result: Any) -> int:
    count = flop_registry.get(func.overloadpacket)
    return count(*args, **options, out_val=result) if count is not None else 0
