"""Conversion of models: from torchscale, flash-linear-attention, syncdoth/RetNet and others to ours, and ours to FLA's.

There is one module per format. Tensors are streamed: a checkpoint may be larger than memory, and one shard of it is in
memory at a time.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retnet.models.config import ModelConfig
from retnet.models.convert import bailing, fla, hybrid, llama, mamba, minicpm_sala, minimax, syncdoth, torchscale
from retnet.models.convert.table import Format, in_our_names, in_their_names
from retnet.models.directory import (
    CONFIG_FILE,
    build_empty,
    fill,
    open_model,
    stored_config,
    stored_tensors,
    write_config,
    write_model,
)
from retnet.models.lm import LanguageModel
from retnet.models.tensor_files import Tensors, open_tensors, write_tensors
from retnet.system.files import read_json
from retnet.system.outputs import check_new_directory, filled_directory
from retnet.system.suggest import choices

OURS = "retnet"
_ALL = (
    torchscale.FORMAT, fla.FORMAT, syncdoth.FORMAT, llama.FORMAT, mamba.MAMBA1, mamba.MAMBA2, minimax.FORMAT,
    bailing.FORMAT, minicpm_sala.FORMAT, hybrid.FORMAT,
)  # fmt: skip
FORMATS: dict[str, Format] = {format.name: format for format in _ALL}
# Types of transformers' configurations that would be taken for one of FORMATS, or asked for as such.
REFUSED_TYPES = {
    "bailing_hybrid": "Kimi delta attention, which our layers do not have; accepted: bailing_moe_linear (Ling- and "
    "Ring-linear 2.0)",
    "yoco": "its cross-decoder layers share the keys and values of one layer; accepted: its GatedRetention layers, one "
    "by one, by retnet.models.convert.fla_layers",
}
Source = str | os.PathLike[str] | Mapping[str, Tensor]

# Files beside the weights that are the same in every format: they are copied.
_SIDE_FILES = (
    "added_tokens.json", "chat_template.jinja", "generation_config.json", "merges.txt", "special_tokens_map.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
)  # fmt: skip


def load(
    source: Source,
    format: str | None = None,
    config: object = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> LanguageModel:
    """A model of another library as our `LanguageModel`, in evaluation mode.

    Args:
        source: a directory, a file of weights, or a state dict.
        format: a key of FORMATS, or "retnet"; recognised from the tensors if None.
        config: the source's own configuration (a mapping, an object with attributes, or a path to JSON), needed if
            neither the directory nor the checkpoint holds one; or a ModelConfig.
        device, dtype: of the weights; dtype as stored if None.

    Raises FileNotFoundError if there are no weights, ValueError that names what is missing, left over, of the wrong
    shape, or not supported by our models.
    """
    ours, tensors = _open(source, format, config)
    return fill(build_empty(ours), tensors, device=device, dtype=dtype)


def convert(
    source: Source | LanguageModel,
    out: str | os.PathLike[str],
    *,
    to: str = OURS,
    format: str | None = None,
    config: object = None,
    on_bytes: Callable[[int, int], None] | None = None,
) -> ModelConfig:
    """Write a model as a directory in our format, or in that of `to`. Weights are streamed, tokenizer files are copied.

    source: as for `load`, or a model. out: new or empty, and so again after an error. on_bytes: gets the bytes of
    weights read so far, and of all. Returns our configuration of the model.
    """
    writers = {name: form.config_to for name, form in FORMATS.items() if form.config_to}
    if to not in (OURS, *writers):
        raise ValueError(f"cannot write the format {to!r}; {choices(to, (OURS, *writers))}")
    out = Path(out)
    check_new_directory(out)
    ours, tensors = _open(source, format, config)
    if on_bytes is not None:
        tensors = tensors.watched(on_bytes)
    data = None if to == OURS else writers[to](ours)  # may raise, so it runs before anything is written
    with filled_directory(out):
        if data is None:
            ours = write_model(out, ours, tensors)
        else:
            write_tensors(out, in_their_names(FORMATS[to], ours, tensors))
            write_config(out, data)
        if isinstance(source, (str, os.PathLike)):
            copy_side_files(Path(source), out)
    return ours


def copy_side_files(source: Path, out: Path) -> None:
    """Copy the tokenizer and the generation settings of a model directory."""
    for name in _SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _open(source: Source | LanguageModel, format: str | None, config: object) -> tuple[ModelConfig, Tensors]:
    """Our configuration of the source, and its tensors under our names."""
    if format is not None and format not in (OURS, *FORMATS):
        raise ValueError(f"format is {format!r}; {choices(format, (OURS, *FORMATS))} (None recognises it)")
    if isinstance(source, LanguageModel):
        return stored_config(source), Tensors.of(stored_tensors(source))
    is_state_dict = isinstance(source, Mapping)
    if not is_state_dict and (format == OURS or (format is None and _is_ours(Path(source)))):
        return open_model(source)
    theirs = Tensors.of(source) if is_state_dict else open_tensors(source)
    if format is None:
        format = _named_by_type(None if is_state_dict else Path(source), config)
    form = FORMATS[format] if format else _recognise(theirs, "the state dict" if is_state_dict else str(source))
    if form.prefix and form.prefix + form.marker in theirs.specs:
        theirs = theirs.renamed({name.removeprefix(form.prefix): name for name in theirs.specs})
    if not isinstance(config, ModelConfig):
        values, where = _source_config(None if is_state_dict else Path(source), theirs, config, form)
        try:
            config = form.config_of(_with_vocab_size(values, form, theirs))
            config = ModelConfig.from_dict(config.to_dict())  # checks every value's type
        except ValueError as error:
            raise ValueError(f"{where}{error}") from error
        config = form.effective(config, theirs) if form.effective else config
    return in_our_names(form, config, theirs)


def _is_ours(path: Path) -> bool:
    file = path / CONFIG_FILE
    return file.is_file() and "model_config" in read_json(file)


def _named_by_type(path: Path | None, config: Any) -> str | None:
    """The format whose model_types have that of the configuration, given or in the directory; None without one.

    Raises ValueError for types that are refused by name.
    """
    if config is None and path is not None and (path / CONFIG_FILE).is_file():
        config = path / CONFIG_FILE
    if isinstance(config, (str, os.PathLike)):
        config = read_json(Path(config))
    kind = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)
    if not isinstance(kind, str):
        return None
    if kind in REFUSED_TYPES:
        raise ValueError(f"model_type is {kind!r}: {REFUSED_TYPES[kind]}")
    return next((name for name, form in FORMATS.items() if kind in form.model_types), None)


def _recognise(theirs: Tensors, where: str) -> Format:
    found = [f for f in FORMATS.values() if {f.marker, f.prefix + f.marker} & theirs.specs.keys()]
    if len(found) != 1:
        examples = ", ".join(list(theirs.specs)[:3])
        raise ValueError(
            f"{where} is in no known format (its tensors: {examples}, ...); accepted: {', '.join((OURS, *FORMATS))}"
        )
    return found[0]


def _source_config(path: Path | None, theirs: Tensors, config: Any, form: Format) -> tuple[Mapping[str, Any], str]:
    """The source's own configuration: as given, from its directory, or from inside its checkpoint.

    Returned with the file that holds it, as messages begin with it.
    """
    where = ""
    if config is None and path is not None and (path / CONFIG_FILE).is_file():
        config = path / CONFIG_FILE
    if config is None:
        inside = [theirs.extra.get(key) for key in ("args", "config", "cfg")]
        config = next((value for value in inside if value), None)
        nested = config.get("model") if isinstance(config, Mapping) else None
        config = nested if isinstance(nested, (Mapping, argparse.Namespace)) else config
        where = f"{path}: "
    if isinstance(config, (str, os.PathLike)):
        where = f"{config}: "
        config = read_json(Path(config))
    if not isinstance(config, Mapping) and callable(
        getattr(config, "to_dict", None)
    ):  # a configuration of transformers
        config = config.to_dict()
    if not isinstance(config, Mapping) and hasattr(config, "__dict__"):  # a namespace, torchscale's RetNetConfig, ...
        config = vars(config)
    if not isinstance(config, Mapping):
        raise ValueError(
            f"weights in the format {form.name} without a configuration; accepted: config=..., its config.json, or "
            "the arguments that the model was built with"
        )
    return config, where


def _with_vocab_size(values: Mapping[str, Any], form: Format, theirs: Tensors) -> Mapping[str, Any]:
    """The configuration with a vocabulary size: without one (torchscale writes -1), the number of embeddings."""
    if values.get("vocab_size") not in (None, -1):
        return values
    embedding = theirs.specs.get(form.embedding)
    if embedding is None:
        raise ValueError(f"these are not weights in the format {form.name}: {form.embedding} is missing")
    return {**values, "vocab_size": (embedding.shape or [0])[0]}
