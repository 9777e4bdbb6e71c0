"""Who keeps what for backward: autograd's own account of a captured graph, node by node.

The graph is run once on fake tensors (shapes, strides and storages without memory), under hooks
that see every tensor that autograd saves. Storages are counted, not tensors: a view costs nothing,
and neither does what several nodes save together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import GraphModule, Interpreter, Node

from surgery.compat.tensors import FakeTensorMode, fakes, held_by, is_wrapper, leaves, storage_of
from surgery.graph.nodes import checkpointed
from surgery.graph.reading import bodies, writes
from surgery.weights.sites import site_of, stand_in

GENERATOR = 5056  # bytes of the CPU generator's state, kept to draw the same masks again


class _Storages:
    """The storages that were met, by address, with their bytes."""

    def __init__(self) -> None:
        self.size: dict[int, int] = {}
        self._kept: list[Any] = []  # an address must not be used again

    def of(self, values: Iterable[Any]) -> set[int]:
        found = set()
        for value in values:
            for own in held_by(value):
                storage, key = own.untyped_storage(), storage_of(own)
                self._kept.append(storage)
                self.size[key] = storage.nbytes()
                found.add(key)
        return found


class Saved(Interpreter):
    """What autograd saves for backward in one graph, node by node.

    now: whether to leave out what is saved for weights that are not being trained at the moment.
    saves: the storages that autograd saves for each node. outputs: the storages of each node's
    result. size: the bytes of each storage. free: the storages that live anyway, those of weights
    and of the graph's inputs. bodies: for each checkpointed node, the inputs of its body, which has
    a `Saved` of its own.
    """

    def __init__(
        self,
        graph: GraphModule,
        inputs: Sequence[Any],
        mode: FakeTensorMode | None = None,
        now: bool = False,
    ) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.module: GraphModule
        self.saves: dict[Node, set[int]] = {}
        self.outputs: dict[Node, set[int]] = {}
        self._storages = _Storages()
        self.size = self._storages.size
        self.free: set[int] = set()
        self.bodies: dict[Node, tuple[Any, ...]] = {}
        self.mode = mode or fakes(real=True)
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # it would hand out fakes later
        try:
            with self.mode, torch.enable_grad():
                self.inputs = [_fake(self.mode, value, now) for value in inputs]
                self.free |= self._storages.of(self.inputs)
                self.run(*self.inputs)
        finally:
            torch.set_autocast_cache_enabled(cached)

    def run_node(self, n: Node) -> Any:
        saved, of = self.saves.setdefault(n, set()), self._storages.of

        def pack(tensor: Tensor) -> Tensor:
            # Autograd holds this, in C++, for as long as a result lives. Did it hold the account,
            # which has the results, Python could never take the two away.
            saved.update(of([tensor]))
            return tensor.detach()

        args, options = (), {}
        if n.target is checkpointed:
            args, options = self.fetch_args_kwargs_from_env(n)
            self.bodies[n] = tuple(_detached(value) for value in args[1:])
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            result = super().run_node(n)
        if n in self.bodies and not any(_needs_gradient(value) for value in leaves(result)):
            saved.clear()  # a checkpoint of nothing that is trained lets its inputs go
        elif n in self.bodies:
            saved.update(of(args[1:]))  # kept by the checkpoint itself
            if options.get("preserve_rng_state", True):
                state = -len(self.bodies)  # not the address of any storage
                self.size[state] = GENERATOR
                saved.add(state)
        self.outputs[n] = of(leaves(result))
        if n.op == "get_attr":
            self.free |= self.outputs[n]
        return result

    @property
    def keepers(self) -> dict[int, list[Node]]:
        """For each storage, the nodes that autograd saves it for, in the order of the graph."""
        found: dict[int, list[Node]] = {}
        for node, storages in self.saves.items():
            for storage in storages:
                found.setdefault(storage, []).append(node)
        return found

    @property
    def written(self) -> set[int]:
        """Storages that some node may write into, so that what was saved of them may be stale."""
        return {
            storage
            for node in self.outputs
            if writes(node)
            for source in node.all_input_nodes
            for storage in self.outputs[source]
        }

    def inner(self) -> Iterable[tuple[Node, Saved]]:
        """Return the node of each checkpointed region, with the `Saved` of its graph."""
        for node, body in bodies(self.module):
            yield node, Saved(body, self.bodies[node], self.mode)

    def bytes(self, storages: Iterable[int]) -> int:
        """Return the bytes of storages, without those that live anyway."""
        return sum(self.size[storage] for storage in set(storages) - self.free)

    @property
    def total(self) -> int:
        """The bytes that forward keeps for backward, outside of checkpoints."""
        return self.bytes(storage for saved in self.saves.values() for storage in saved)


def _fake(mode: FakeTensorMode, value: Any, now: bool) -> Any:
    if isinstance(value, SymInt):
        return value.node.hint  # int(value) would make Dynamo guard on it
    if isinstance(value, Tensor) and not mode.is_our_fake(value):
        # Classes with data of their own (bitsandbytes') are taken for tensors of their bytes.
        known = value if is_wrapper(value) else value.as_subclass(Tensor)
        fake = mode.from_tensor(known.detach(), static_shapes=True)
        return _same_site(value, fake.requires_grad_(_trained(value, now)))
    return value


def _needs_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _same_site(value: Tensor, fake: Tensor) -> Tensor:
    """Let the nodes of a kit, which know a weight by identity, know what stands for it here.

    Not the gates: they would detach what is not trained at the moment.
    """
    site = site_of(value)
    if site is not None and site.coordinates[0].beside is not None:
        stand_in(fake, value)
    return fake


def _trained(value: Tensor, now: bool) -> bool:
    """Whether a tensor gets a gradient: of weights, what is trained now says so, or no one."""
    site = site_of(value)
    if site is None:
        return value.requires_grad
    if site.mapped:
        return False
    return not now or any(each.active for each in site.coordinates)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _same_site(value, value.detach().requires_grad_(value.requires_grad))
    return value
