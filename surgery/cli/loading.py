"""Models with their weights, and tokenizers, for `surgery train` and `surgery export`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from surgery.errors import ModelError, OptionError, extra, in_a_line
from surgery.prediction.sources import config_of


def tokenizer_of(source: str) -> Any:
    """Return the tokenizer of a folder, a hub id, or a config.json's folder. Raises ModelError."""
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise extra("hf", "tokenizers of Hugging Face are read by transformers") from error
    place = str(Path(source).parent) if Path(source).is_file() else source
    try:
        return AutoTokenizer.from_pretrained(place)
    except Exception as error:  # of tokenizers' own, of any kind
        raise ModelError(
            f"no tokenizer in {place!r}: {in_a_line(error, 200)} Name one: --tokenizer=..."
        ) from error


def weights_of(source: str, dtype: str, classes: tuple[str, ...], pad: int, seed: int) -> Any:
    """Return a model in training mode: a classifier if there are classes, else a causal LM.

    source: a hub id or a folder; a file config.json is a model without weights, which are drawn
    from `seed`, as a classifier's head is. dtype: a name; "auto" is the checkpoint's own. Raises
    ModelError.
    """
    config = config_of(source)
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind: Any = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    if classes:
        config.num_labels = len(classes)
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: i for i, name in enumerate(classes)}
        config.problem_type = "single_label_classification"
        config.pad_token_id = pad
    chosen: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    torch.manual_seed(seed)
    try:
        if Path(source).is_file():
            own = getattr(config, "dtype", None) if dtype == "auto" else chosen
            model = kind.from_config(config, dtype=own)
        else:
            # A head of another number of classes is drawn anew.
            model = kind.from_pretrained(
                source, config=config, dtype=chosen, ignore_mismatched_sizes=bool(classes)
            )
    except (OSError, ValueError) as error:
        raise ModelError(f"{source!r} cannot be loaded: {in_a_line(error, 300)}") from error
    return model.train()


def check_length(model: Any, length: int, largest: int) -> None:
    """Raise OptionError if a model cannot read rows so long, or tokens of so large numbers."""
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and length > most:
        raise OptionError(f"--length {length} is more than the {most} positions of the model.")
    known = model.get_input_embeddings().num_embeddings
    if largest >= known:
        raise OptionError(
            f"the tokenizer has a token {largest}, but the model knows {known}. They do not belong "
            "together: name the model's own tokenizer, --tokenizer=..."
        )


def keep_shape(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write what a model is, but for its weights, for `shape_of`; in one piece."""
    made = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(made, ignore_errors=True)
    model.config.save_pretrained(made)
    if model.can_generate():
        model.generation_config.save_pretrained(made)
    tokenizer.save_pretrained(made)
    made.replace(folder)


def shape_of(source: str, record: Mapping[str, Any]) -> Any:
    """Return a model with weights of no meaning, for a save whose record is given.

    source: a folder, hub id or config.json. Raises ModelError.
    """
    config = config_of(source)
    import transformers

    kind = getattr(transformers, record["model"], None)
    if kind is None:
        raise ModelError(
            f"the save is of a {record['model']}, which transformers does not have. Load it in "
            "Python: surgery.load, surgery.export."
        )
    model = kind(config)
    kinds = {dtype for dtype, *_ in record["weights"].values() if "float" in dtype}
    if len(kinds) == 1:
        model = model.to(getattr(torch, kinds.pop()))
    if model.can_generate() and (Path(source) / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(source)
    return model
