"""Plain checkpoints: `surgery.export` writes what `AutoModel.from_pretrained` loads.

No key of it tells of surgery or of adapters, whatever was applied, at any step.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from surgery.api import remove
from surgery.checkpoints import encoding
from surgery.contract.options import to_json
from surgery.engine.finding import applied
from surgery.engine.surgery import Surgery
from surgery.errors import CheckpointError, OptionError
from surgery.ranks import on_first_rank
from surgery.weights import shards

ADAPTERS = "adapters"  # folder of PEFT's adapters inside of the checkpoint


def export(
    model: nn.Module, folder: str | Path, merge: bool = False, max_shard_size: str = "50GB"
) -> None:
    """Write a checkpoint that plain transformers loads, with a model card; at any step.

    model: a Hugging Face model (config.json, model.safetensors), a plain module (model.safetensors)
    or a PEFT model: its base, with the base's own keys, and the adapters in `folder/adapters`, for
    `PeftModel.from_pretrained(base, folder / "adapters")`. merge: the adapters are added to the
    base instead (in a copy: this takes the memory of a second model). On several ranks all call it.
    Raises ModelError if nothing was applied, OptionError if there is nothing to merge,
    CheckpointError if it cannot be written; what was in the folder is then as before.
    """
    surgery, folder = applied(model), Path(folder)
    plain = _unwrapped(model, surgery)
    if merge and not _adapted(plain):
        raise OptionError("merge=True adds PEFT adapters to the base, and this model has none.")
    cut = shards.is_sharded(plain)
    if cut and _adapted(plain):
        raise CheckpointError(
            "PEFT adapters on a model that FSDP2 shards cannot be exported. surgery.save it, load "
            "that in one process without fully_shard, and export there."
        )
    with on_first_rank() as first:
        state = shards.whole_state(plain, first) if cut else None  # on all ranks
        if first:
            _export(plain, surgery, folder, merge, max_shard_size, state)


def _export(
    model: Any, surgery: Surgery, folder: Path, merge: bool, shards: str, state: Any
) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
            if state is None:
                _write(model, Path(made), folder, merge, shards)
            else:
                _write_plain(model, Path(made), state, shards)
            (Path(made) / "README.md").write_text(_card(model, surgery))
            _move(Path(made), folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not export to {folder}: {error}. Free some space, or give a folder that can be "
            "written to."
        ) from error


def _unwrapped(model: nn.Module, surgery: Surgery) -> nn.Module:
    """Return the model without data-parallel wrappers, with the adapters that are around it."""
    return next(m for m in model.modules() if _adapted(m) or m is surgery.decision.model)


def _adapted(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _write(model: Any, made: Path, folder: Path, merge: bool, shards: str) -> None:
    if _adapted(model) and merge:
        model = _merged(model)
    if not _adapted(model):
        _write_plain(model, made, None, shards)
        return
    base = model.get_base_model()
    _write_plain(base, made, _base_state(model, base), shards)
    model.save_pretrained(made / ADAPTERS)
    for config in (made / ADAPTERS).rglob("adapter_config.json"):
        content = json.loads(config.read_text()) | {"base_model_name_or_path": str(folder)}
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


def _merged(model: Any) -> Any:
    merged: Any = copy.deepcopy(model)
    remove(merged)
    return merged.merge_and_unload()


def _base_state(model: Any, base: nn.Module) -> dict[str, Tensor]:
    """Return the base's state by its own keys, adapters and trained copies left out."""
    adapters = (model.base_model.prefix, "modules_to_save.", "trainable_tokens_")
    found = {}
    for key, value in base.state_dict().items():
        if not any(word in key for word in adapters):
            plain = key.replace(".base_layer.", ".").replace(".original_module.", ".")
            found[plain.replace("token_adapter.", "")] = value
    return found


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


def _move(made: Path, folder: Path) -> None:
    """Put the files of a finished checkpoint in place; weights before what names them."""
    if not folder.exists():
        made.rename(folder)
        made.mkdir()  # for its owner to remove
        return
    files = [file for file in made.rglob("*") if file.is_file()]
    old = [*folder.glob("model*.safetensors"), *folder.glob("model.safetensors.index.json")]
    for file in sorted(files, key=lambda file: file.suffix != ".safetensors"):
        target = folder / file.relative_to(made)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
    for file in old:
        if not any(file.name == new.name for new in files):
            file.unlink()  # a shard of another count would be loaded in place of the new ones
    if not (made / ADAPTERS).exists():
        shutil.rmtree(folder / ADAPTERS, ignore_errors=True)


def _card(model: nn.Module, surgery: Surgery) -> str:
    """Return the model card: what trained this, with which options."""
    name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    passes = [to_json(options) for options in surgery.decision.passes]
    tags = "\n".join(f"- {each}" for each in ["model-surgery", *(p["name"] for p in passes)])
    return "\n".join(
        [
            "---",
            "library_name: transformers" if hasattr(model, "config") else "library_name: pytorch",
            f"tags:\n{tags}",
            "---",
            "",
            f"# {Path(name).name}, trained by model surgery",
            "",
            f"{surgery.clock.step} optimizer steps with model-surgery {version('model-surgery')}:",
            "",
            *_rows(passes),
            "",
            "The checkpoint is a plain one: it is loaded without the library.",
            "",
        ]
    )


def _rows(passes: Iterable[dict[str, Any]]) -> Iterator[str]:
    yield "| pass | options |"
    yield "|---|---|"
    for each in passes:
        options = ", ".join(f"{key}={value!r}" for key, value in each["options"].items())
        yield f"| {each['name']} | {options} |"
