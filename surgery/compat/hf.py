"""What transformers does for the sake of reentrant checkpoints, undone: captured ones are not.

It makes the embeddings' output require gradients (which, with frozen embeddings, would force
backward through every block), and some attention modules do the same to a bias of theirs (T5 and
its relatives), which Dynamo cannot follow inside a checkpoint.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import Tensor, nn

from surgery.compat import modules

HOOK = "make_inputs_require_grad"  # what transformers and PEFT call it, with and without an s


class Workarounds:
    """The workarounds of one model: taken off when switched on, put back by `restore`."""

    def __init__(self, model: nn.Module) -> None:
        self.embeddings = _input_embeddings(model)
        self.biased: Sequence[Any] = [m for m in model.modules() if _only_makes_biases_require(m)]
        self.off: list[Any] = []
        self.hooks: list[tuple[nn.Module, int, Any]] = []

    def take_off(self) -> None:
        """Called before every training forward, since checkpointing may be enabled at any time."""
        # By hand: called twice, transformers' own enable_ forgets the hooks of the first time.
        for module in self.embeddings:
            for key, hook in modules.forward_hooks(module):
                if getattr(hook, "__name__", "").startswith(HOOK):
                    self.hooks.append((module, key, hook))
                    modules.take_hook(module, key)
        for module in self.biased:
            if module.gradient_checkpointing:
                module.gradient_checkpointing = False
                self.off.append(module)

    def restore(self) -> None:
        """Switch on again what was switched off."""
        for module, key, hook in self.hooks:
            modules.put_hook(module, key, hook)
        for module in self.off:
            module.gradient_checkpointing = True
        self.hooks.clear()
        self.off.clear()


def steps_of_trainer(calls: Iterable[FrameType]) -> int:
    """Return the steps that a Trainer among the calls has made; 0 if there is none."""
    module: Any = sys.modules.get("transformers.trainer")
    if module is None:
        return 0
    for frame in calls:
        caller: Any = frame.f_locals.get("self")
        if isinstance(caller, module.Trainer):
            return caller.state.global_step
    return 0


@contextmanager
def fakes_taken_for_real(is_fake: Callable[[Any], bool]) -> Iterator[None]:
    """Let transformers look into tensors without memory, but for those that `is_fake` names.

    Of a fake tensor it believes that a graph is traced, which must do for any mask; a step that is
    played must go the way of a real one.
    """
    module: Any = sys.modules.get("transformers.utils.import_utils")
    before = getattr(module, "is_fake_tensor", None)
    if before is None:
        yield
        return
    module.is_fake_tensor = is_fake
    try:
        yield
    finally:
        module.is_fake_tensor = before


def has_peft() -> bool:
    """Whether PEFT is there, whose get_peft_model switches requires_grad of all weights off."""
    return "peft" in sys.modules


def has_adapters(model: nn.Module) -> bool:
    """Whether transformers' own `add_adapter` has put adapters into a model."""
    return bool(vars(model).get("_hf_peft_config_loaded"))


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Let `save_pretrained` write a model itself, and not what `add_adapter` has put into it."""
    loaded = has_adapters(model)
    if loaded:
        vars(model)["_hf_peft_config_loaded"] = False
    try:
        yield
    finally:
        if loaded:
            vars(model)["_hf_peft_config_loaded"] = True


def of_adapters(model: nn.Module) -> set[nn.Module]:
    """Return the modules that PEFT has put into a model: `disable_adapter` switches
    requires_grad of their weights off, and on again behind it."""
    layers: Any = sys.modules.get("peft.tuners.tuners_utils")
    if layers is None:
        return set()
    found: set[nn.Module] = set()
    for module in model.modules():
        layer: Any = module
        if isinstance(module, layers.BaseTunerLayer):
            inner = set(layer.get_base_layer().modules())
            found |= set(module.modules()) - inner
    return found


def lora_layers(model: nn.Module) -> dict[str, tuple[nn.Module, str | None]]:
    """Return PEFT's LoRA layers on Linears, by name, each with its variant (such as DoRA's)."""
    lora: Any = sys.modules.get("peft.tuners.lora.layer")
    named = [(n, m) for n, m in model.named_modules() if lora and isinstance(m, lora.Linear)]
    kinds = [next(iter(getattr(m, "lora_variant", {}).values()), None) for _, m in named]
    return {
        name: (module, None if kind is None else type(kind).__name__)
        for (name, module), kind in zip(named, kinds, strict=True)
    }


def lora_factors(layer: Any) -> list[tuple[Tensor, Tensor, float]] | None:
    """Return A, B and s of each active adapter of a LoRA layer; None if the adapters are disabled
    or merged into the weight."""
    if layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    return [
        (layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
        for name in active
    ]


def wants_gradients(model: nn.Module) -> str | None:
    """Return the name of a module of PEFT that reads gradients of its weights between steps."""
    adalora: Any = sys.modules.get("peft.tuners.adalora")
    for name, module in model.named_modules():
        if adalora is not None and isinstance(module, adalora.AdaLoraModel):
            return name
    return None


def _input_embeddings(model: nn.Module) -> Sequence[nn.Module]:
    """Return the modules whose output transformers would let require gradients."""
    found = {id(own): own for own in map(input_embeddings, model.modules()) if own is not None}
    return [*found.values()]


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the module that embeds a model's inputs, if it has one."""
    getter = getattr(type(model), "get_input_embeddings", None)
    try:
        own = getter(model) if getter is not None else None
    except NotImplementedError:  # transformers' way to say that a model has none
        return None
    return own if isinstance(own, nn.Module) else None


def _only_makes_biases_require(module: nn.Module) -> bool:
    """Whether the forward reads its checkpointing flag, but runs no checkpoint of its own."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    names = code.co_names if code is not None else ()
    reads = "gradient_checkpointing" in names and "requires_grad" in names
    return reads and "_gradient_checkpointing_func" not in names


def chunks_its_head(model: nn.Module) -> str | None:
    """Return "TRL" if TRL has given the model a forward that chunks head and loss, else None."""
    for module in model.modules():
        own = module.__dict__.get("forward")
        function: Any = getattr(own, "__func__", own)
        if str(getattr(function, "__globals__", {}).get("__name__", "")).startswith("trl."):
            return "TRL"
    return None


def checkpoint_blocks(model: Any) -> None:
    """Switch gradient checkpointing on, by the name that does not warn (new in 5.23 or before)."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
