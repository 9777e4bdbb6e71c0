"""Plain checkpoints: `surgery.export` writes what `AutoModel.from_pretrained` loads.

No key of it tells of surgery or of adapters, whatever was applied, at any step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from surgery.checkpoints import adapters, encoding
from surgery.checkpoints.contents import check_whole, extra_of
from surgery.checkpoints.folder import abandoned, clear, partial_in
from surgery.checkpoints.placing import CARD, abandon, card, place
from surgery.checkpoints.ranks import on_first_rank
from surgery.compat import hf
from surgery.engine.finding import applied
from surgery.engine.surgery import Surgery
from surgery.errors import CheckpointError, in_a_line, listed
from surgery.weights import additions, shards

ADAPTERS = "adapters"  # folder of PEFT's adapters inside of the checkpoint


def export(
    model: nn.Module, folder: str | Path, merge: bool = False, max_shard_size: str = "50GB"
) -> None:
    """Write a checkpoint that plain transformers loads, with a model card, after any step.

    With several ranks, all must call it.

    model: a Hugging Face model (written as config.json and model.safetensors), a plain module
    (model.safetensors), or a model with PEFT adapters. Of the latter, the base is written with its
    own keys and the adapters into `folder/adapters`, for
    `PeftModel.from_pretrained(base, folder / "adapters")`. merge: whether to add the adapters to
    the base instead; this is done in a copy, which takes the memory of a second model.

    Raises ModelError if nothing was applied; OptionError if there is nothing to merge;
    CheckpointError if the checkpoint cannot be written, which leaves the folder as it was.
    """
    surgery, folder = applied(model), Path(folder)
    plain = _unwrapped(model, surgery)
    check_whole(model, plain, "export")
    _check_extra(plain)
    if merge:
        adapters.check_mergeable(plain)
    elif adapters.are_on(plain):
        adapters.check_apart(plain)
    cut = shards.is_sharded(plain)
    if cut and adapters.are_on(plain):
        raise CheckpointError(
            "PEFT adapters on a model that FSDP2 shards cannot be exported. Use surgery.save, load "
            "the save in one process without fully_shard, and export there."
        )
    with on_first_rank() as first:
        state = shards.whole_state(plain, first) if cut else None  # on all ranks
        if first:
            _export(plain, surgery, folder, merge, max_shard_size, state)


def _export(
    model: Any, surgery: Surgery, folder: Path, merge: bool, shards: str, state: Any
) -> None:
    there = folder.resolve()  # files are moved within one disk: a folder may be a mounted one
    made = partial_in(there if there.is_dir() else there.parent)
    try:
        made.parent.mkdir(parents=True, exist_ok=True)
        for left in abandoned(made.parent):
            abandon(left)
        made.mkdir()  # of the usual mode, which the folder keeps
        try:
            state = additions.write(model, state, made)
            with additions.left_out(model):
                if state is None:
                    _write(model, made, folder, merge, shards)
                else:
                    _write_plain(model, made, state, shards)
            (made / CARD).write_text(card(model, surgery))
            place(made, there)
            clear(there)
        finally:
            abandon(made)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of transformers, PEFT or safetensors, about this model
        raise CheckpointError(
            f"this model could not be exported: {in_a_line(error, 300)} The old export is "
            "untouched. surgery.save keeps all of it."
        ) from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not export to {folder}: {error}. Free some space, or give a folder that can be "
            "written to."
        ) from error


def _unwrapped(model: nn.Module, surgery: Surgery) -> nn.Module:
    """Return the model without data-parallel wrappers, with the adapters that are around it."""
    return next(m for m in model.modules() if adapters.are_on(m) or m is surgery.decision.model)


def _check_extra(model: nn.Module) -> None:
    """Raise CheckpointError if modules have extra state that a file of tensors cannot hold."""
    kept = [n for n, extra in extra_of(model).items() if not isinstance(extra, Tensor)]
    if kept:
        names = listed([name or type(model).__name__ for name in kept])
        raise CheckpointError(
            f"the extra state of {names} (get_extra_state) is not a tensor, but a plain checkpoint "
            "holds only tensors. Use surgery.save, which keeps it, or let get_extra_state return a "
            "tensor."
        )


def _write(model: Any, made: Path, folder: Path, merge: bool, shards: str) -> None:
    if not adapters.are_on(model):
        _write_plain(model, made, None, shards)
    elif merge:
        _write_plain(adapters.merged(model), made, None, shards)
        adapters.check_merged(model, made)
    else:
        with hf.without_adapters(model):
            _write_plain(adapters.base_of(model), made, adapters.base_state(model), shards)
        model.save_pretrained(made / ADAPTERS)
        adapters.check_written(model, made / ADAPTERS)
        for config in (made / ADAPTERS).rglob("adapter_config.json"):
            content = json.loads(config.read_text()) | {"base_model_name_or_path": str(folder)}
            if isinstance(content.get("init_lora_weights"), str):
                # PiSSA and others begin by taking a part off the base; this base lacks it already.
                content["init_lora_weights"] = True
            config.write_text(json.dumps(content, indent=2) + "\n")


def _write_plain(model: Any, made: Path, state: dict[str, Tensor] | None, shards: str) -> None:
    if not hasattr(model, "save_pretrained"):
        if state is None:
            save_model(model, str(made / "model.safetensors"))
        else:
            save_file(encoding.untied(state), made / "model.safetensors")
        return
    with _not_quantised(model):
        model.save_pretrained(made, state_dict=state, max_shard_size=shards)


@contextmanager
def _not_quantised(model: Any) -> Iterator[None]:
    """A GGUF file that was loaded counts as quantised, though its weights are plain numbers."""
    quantiser = getattr(model, "hf_quantizer", None)
    settings = getattr(model.config, "quantization_config", None)
    kind = getattr(getattr(quantiser, "quantization_config", settings), "quant_method", None)
    if getattr(kind, "value", kind) != "gguf":
        yield
        return
    names = ("hf_quantizer", "quantization_method")
    before = {name: vars(model)[name] for name in names if name in vars(model)}
    for name in before:
        delattr(model, name)
    if settings is not None:
        del model.config.quantization_config
    try:
        yield
    finally:
        vars(model).update(before)
        if settings is not None:
            model.config.quantization_config = settings
