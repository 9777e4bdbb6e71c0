"""Which tensors the coordinates of a surgery and their hooks are on: renewed when they change."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgery.compat import autograd, hf, modules
from surgery.compat.fsdp import twins
from surgery.engine.backward import Backward
from surgery.engine.callers import calls
from surgery.engine.decide import Decision
from surgery.engine.fsdp import check_cut, replicated, take_cut
from surgery.engine.guards import hooked, replaced, unfrozen
from surgery.weights import copies, shards
from surgery.weights.coordinate import unique
from surgery.weights.table import TABLE, CoordinateTable


@dataclass(eq=False, kw_only=True)
class Binding:
    """The binding of one surgery. cut: whether FSDP2 shards the model. known: of a model whose
    weights are trained themselves, every parameter as it was last bound: where it is held, under
    which key, and whether it was trained."""

    decision: Decision
    backward: Backward
    bound: bool = False
    cut: bool = False
    handles: list[Any] = field(default_factory=list)
    ways: dict[str, tuple[nn.Module, str, nn.Module]] | None = None  # to the modules of sites
    known: list[tuple[Mapping[str, Any], str, nn.Parameter, bool]] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"bound": False, "handles": [], "known": []}

    def bind(self, step: int, forward: bool = False, stepping: bool = False) -> None:
        """Make sites, copies and hooks be of the model's present parameters; cheap when they are.

        What was written by hand, a coordinate or its weight, reaches the other. step: optimizer
        steps made. forward: whether a forward is under way, in which FSDP2 shows whole weights.
        stepping: whether an optimizer's step is: what coordinates say then counts.
        """
        sites, coordinates = self.decision.sites, self.decision.coordinates
        self._check_modules()
        self.backward.begin()
        if self._settled():
            return
        self._freeze()
        table = modules.child(self.decision.model, TABLE)
        if self.bound and all(site.in_place() for site in sites):
            self.keep_up(step, stepping)
            copies.settle(table, sites, step)
            self._know()
            return
        self.release()
        model = self.decision.model
        found = twins(model, forward)
        check_cut(sites, found)
        if isinstance(table, CoordinateTable):
            table.follow({place: weight for place, (weight, _) in found.items()})
        if found:
            take_cut(unique(coordinates), coordinates, table, found)
        for site in sites:
            site.bind(found)
            weight = site.weight()
            for each in site.coordinates:
                if weight is not None:
                    copies.bind(each, weight, step)
        copies.settle(table, sites, step)
        once = unique(coordinates)
        self.cut = bool(found)
        self.backward.bind(
            replicated=replicated(once) if found else (),
            reduced=[s for s in sites if s.copied and shards.is_cut(s.weight())],
        )
        self.handles += [self.backward.watch(each) for each in once]
        self.handles += [self.backward.watch_weight(site) for site in sites if not site.whole]
        self.bound = True
        self._know()

    def _know(self) -> None:
        """Remember what is bound, where that is all that there is to see to."""
        decision = self.decision
        if self.cut or not decision.sites or not all(site.whole for site in decision.sites):
            return
        held = ((modules.all_held(owner), key) for owner, key, _ in decision.flags)
        self.known = [
            (own, key, p, p.requires_grad) for own, key in held if (p := own.get(key)) is not None
        ]

    def _settled(self) -> bool:
        """Whether all is as it was remembered: a look at each parameter, and nothing more."""
        return bool(self.known) and all(
            held.get(key) is p and p.requires_grad is trained
            for held, key, p, trained in self.known
        )

    def swapped(self) -> bool:
        """Whether torch.func.functional_call has put other tensors in the place of weights."""
        if self._settled():
            return False
        held = [modules.held(owner, key) for owner, key, _ in self.decision.flags]
        if any(p is not None and not isinstance(p, nn.Parameter) for p in held):
            return True
        known = [
            (modules.held(site.owner, site.key), bound, site.twin())
            for site in self.decision.sites
            if (bound := site.weight()) is not None
        ]
        lent = any(now is not bound and now is not twin for now, bound, twin in known)
        return lent and modules.swaps(calls())

    def keep_up(self, step: int, stepping: bool) -> None:
        """Let what was written by hand reach what stands for it; see `bind`."""
        if self.bound:
            copies.keep_all_up(self.decision.sites, step, wins=stepping)

    def _freeze(self) -> None:
        """Leave alone what the user has frozen since; not what get_peft_model has switched off."""
        held = [(site, modules.held(site.owner, site.key)) for site in self.decision.sites]
        weights = [(site, weight) for site, weight in held if weight is not None]
        self._check_unfrozen({id(weight) for _, weight in weights})
        off = [weight for _, weight in weights if not weight.requires_grad]
        if off and len(off) == len(weights) and hf.has_peft():
            for weight in off:  # as it leaves all but its own
                weight.requires_grad_(True)
            for site, _ in weights:
                for each in site.coordinates:
                    each.parameter.requires_grad_(True)
        for site, weight in weights:
            for each in site.coordinates:
                if not weight.requires_grad:  # switched on again, it is trained again
                    each.parameter.requires_grad_(each.parameter is not weight)
                each.frozen = not (weight.requires_grad and each.parameter.requires_grad)
            if site.whole or not self.bound:
                continue
            later = len(autograd.later_hooks_of(weight)) > 1  # ours is one
            if later or (site.mapped and autograd.hooks_of(weight)):
                stands = site.coordinates[0].read
                # Optimizers that step inside of backward put one on every parameter.
                everywhere = len(autograd.later_hooks_of(stands)) > 1 or autograd.hooks_of(stands)
                if not everywhere:
                    raise hooked(site.name)

    @contextmanager
    def as_applied(self) -> Iterator[None]:
        """Let Dynamo see inside what it saw when nothing was frozen, so that it traces nothing
        anew: gates read frozen weights detached."""
        held = [site.weight() for site in self.decision.sites if not self.cut]
        frozen = [weight for weight in held if weight is not None and not weight.requires_grad]
        for weight in frozen:
            weight.requires_grad_(True)
        try:
            yield
        finally:
            for weight in frozen:
                weight.requires_grad_(False)

    def _check_unfrozen(self, trained: Container[int]) -> None:
        """Raise ModelError if a weight that no pass trains has been switched on."""
        decision = self.decision
        on = [
            (owner, key)
            for owner, key, _ in (decision.flags if decision.sites else ())
            if (p := modules.held(owner, key)) is not None
            if p.requires_grad and id(p) not in trained
        ]
        if on and hf.has_peft():
            adapters = hf.of_adapters(decision.model)
            of_adapters = [(owner, key) for owner, key, _ in decision.flags if owner in adapters]
            if set(of_adapters) <= set(on):  # all of them, as it does behind `disable_adapter`
                for owner, key in of_adapters:
                    getattr(owner, key).requires_grad_(False)
                on = [each for each in on if each not in set(of_adapters)]
        if on:
            names = {module: name for name, module in decision.model.named_modules()}
            found = [".".join(filter(None, (names.get(o, ""), key))) for o, key in on]
            raise unfrozen(found, [options.name for options in decision.passes])

    def _check_modules(self) -> None:
        """Raise ModelError if a module of a weight is not the model's any more."""
        if self.ways is None:
            self.ways = {}
            for site in self.decision.sites:
                owner, path = self.decision.model, site.name.split(".")[:-1]
                for depth, key in enumerate(path):
                    child = owner.get_submodule(key)
                    self.ways[".".join(path[: depth + 1])] = owner, key, child
                    owner = child
        gone = []
        for name, (owner, key, child) in self.ways.items():
            now = modules.child(owner, key)
            if now is child:
                continue
            if now is not None and any(each is child for each in now.modules()):
                self.ways[name] = owner, key, now  # PEFT has put itself around it
            else:
                gone.append(name)
        if gone:
            raise replaced(gone)

    def release(self) -> None:
        """Take the hooks off and forget the sites."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for site in self.decision.sites:
            site.release()
        self.bound = False
        self.known.clear()
