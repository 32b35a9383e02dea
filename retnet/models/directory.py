"""Saved models: a directory with `config.json` and safetensors, in the layout of transformers.

    config.json        {"model_type": "retnet", "model_config": {...ModelConfig...}, ...}
    model.safetensors  tensors named model.<name in LanguageModel>; a tied head is not stored
    retnet_shim.py     what transformers runs where this package is installed but not imported

Reading and writing need no transformers. Larger models are stored in several files with `model.safetensors.index.json`
(`tensor_files.py`). A sharded checkpoint of training is read too (`shards.py`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retnet.layers.mixers import float32_parameters
from retnet.models.config import ModelConfig
from retnet.models.config_json import merged, outer_fields, token_fields
from retnet.models.lm import LanguageModel
from retnet.models.shards import is_sharded, open_shards
from retnet.models.tensor_files import Tensors, open_tensors, read_all, write_tensors
from retnet.system.files import read_json, write_json, written_whole

MODEL_TYPE = "retnet"
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
PREFIX = "model."
CLASSIFIER_HEAD = "score.weight"
_LAYER = re.compile(r"layers\.(\d{1,9})\.")

SHIM_FILE = "retnet_shim.py"
SHIM = '''"""The classes of this model, for transformers with trust_remote_code=True: those of the installed package.

The package has to be installed. After `import retnet.hf` transformers needs neither this file nor the flag.
"""

from retnet.hf import *  # noqa: F403
'''
AUTO_MAP = {
    "AutoConfig": "retnet_shim.RetNetConfig",
    "AutoModel": "retnet_shim.RetNetModel",
    "AutoModelForCausalLM": "retnet_shim.RetNetForCausalLM",
    "AutoModelForSequenceClassification": "retnet_shim.RetNetForSequenceClassification",
    "AutoModelForTokenClassification": "retnet_shim.RetNetForTokenClassification",
}


def save_model(model: LanguageModel, directory: str | os.PathLike[str]) -> None:
    """Write the model to a directory, which is created if missing. Each file is written atomically."""
    write_model(directory, stored_config(model), Tensors.of(stored_tensors(model)))


def write_model(directory: str | os.PathLike[str], config: ModelConfig, tensors: Tensors) -> ModelConfig:
    """As `save_model`, for weights that need not be in memory: `tensors` named as in LanguageModel, read one by one.

    Returns the configuration as written, with the dtype of the weights.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = replace(config, dtype=dtype_of(tensors.specs))
    write_tensors(directory, tensors.renamed({PREFIX + name: name for name in tensors.specs}))
    write_config(directory, _config_data(config))
    generation = directory / GENERATION_FILE
    if generation.is_file():  # of an earlier save: its token ids would take precedence
        write_json(generation, read_json(generation) | token_fields(config))
    write_shim(directory)
    return config


def write_model_config(directory: str | os.PathLike[str], model: LanguageModel) -> None:
    """Write the `config.json` and the shim of a model whose weights are saved elsewhere, as in a sharded checkpoint."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_config(directory, _config_data(stored_config(model)))
    write_shim(directory)


def _config_data(config: ModelConfig) -> dict[str, Any]:
    """What `config.json` holds."""
    return {
        "architectures": ["RetNetForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_config": config.to_dict(),
        "model_type": MODEL_TYPE,
        **outer_fields(config),
    }


def write_config(directory: Path, data: Mapping[str, Any]) -> None:
    """Write `config.json`, formatted as transformers does."""
    with written_whole(directory / CONFIG_FILE) as file:
        file.write((json.dumps(data, indent=2, sort_keys=True) + "\n").encode())


def write_shim(directory: str | os.PathLike[str]) -> None:
    """Write the file that AUTO_MAP names."""
    with written_whole(Path(directory) / SHIM_FILE) as file:
        file.write(SHIM.encode())


def load_config(directory: str | os.PathLike[str]) -> ModelConfig:
    """The configuration of a saved model.

    Raises FileNotFoundError or ValueError if the directory holds no model, or a model of something else.
    """
    return _model_config(Path(directory), _config_json(Path(directory)))


def load_model(
    directory: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> LanguageModel:
    """A saved model, in evaluation mode.

    dtype: of the weights; as saved if None. In half precision, decay rates and such (`float32_parameters`) are float32.

    Raises FileNotFoundError or ValueError if the directory holds no model, one of something else, or one whose weights
    are missing, damaged, or not those of its configuration.
    """
    config, tensors = open_model(directory)
    model = fill(build_empty(config), tensors, device=device, dtype=dtype)
    model.directory = Path(directory)
    return model


def open_model(directory: str | os.PathLike[str]) -> tuple[ModelConfig, Tensors]:
    """The configuration and the tensors of a saved model, named as in LanguageModel, not read yet.

    Raises as `load_model` does.
    """
    directory = Path(directory)
    config = load_config(directory)
    tensors = open_shards(directory).weights() if is_sharded(directory) else open_tensors(directory)
    if CLASSIFIER_HEAD in tensors.specs:
        raise ValueError(
            f"{directory} holds a classifier; accepted: a language model. AutoModelForSequenceClassification or "
            "AutoModelForTokenClassification of transformers open it, after `import retnet.hf`"
        )
    tensors = tensors.renamed({name.removeprefix(PREFIX): name for name in tensors.specs})
    held = {int(part[1]) for part in map(_LAYER.match, tensors.specs) if part}
    _refuse(directory, size_problems(config, "embedding.weight", tensors.specs.get("embedding.weight"), held))
    _check_tensors(directory, build_empty(config), tensors)
    return replace(config, dtype=dtype_of(tensors.specs)), tensors


def build_empty(config: ModelConfig) -> LanguageModel:
    """The model on the meta device, without memory for its weights: names and shapes, to be filled by `fill`."""
    try:
        with torch.device("meta"):
            return LanguageModel(config)
    except (RuntimeError, OverflowError, TypeError) as error:  # torch's, for sizes that no integer of its own holds
        raise ValueError(f"no tensors have the sizes of this configuration: {error}") from error


def size_problems(config: ModelConfig, name: str, embedding: Tensor | None, held_layers: Collection[int]) -> list[str]:
    """Why the weights are too small for the configuration: found before a model of its size is built.

    name, embedding: of the tensor with a row for each token. held_layers: numbers of layers that the weights have.
    """
    problems = []
    if embedding is None:
        problems.append(f"{name} is missing")
    elif list(embedding.shape) != [config.vocab_size, config.d_model]:
        problems.append(f"{name} has shape {list(embedding.shape)}, not {[config.vocab_size, config.d_model]}")
    missing = next(i for i in range(len(held_layers) + 1) if i not in held_layers)
    if missing < len(config.layers):
        problems.append(f"layer {missing} of {len(config.layers)} is missing")
    return problems


def fill(
    model: LanguageModel, tensors: Tensors, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> LanguageModel:
    """Give a model on the meta device its weights: `tensors` named as in LanguageModel, without a tied head."""
    weights = read_all(tensors, device=device, dtype=dtype, wide=float32_parameters())
    model.load_state_dict(weights, strict=False, assign=True)
    if model.config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model.eval()


def in_dtypes(
    model: LanguageModel, dtypes: Mapping[str, torch.dtype], weights: Mapping[str, Tensor] | None = None
) -> LanguageModel:
    """A copy on the CPU whose weights have these dtypes, by their names in LanguageModel.

    weights: instead of the model's own, which may be shards or empty; a tied head may be left out.
    """
    given = model.state_dict() if weights is None else weights
    tensors = {name: x.detach().to("cpu", dtypes[name], copy=True) for name, x in given.items()}
    config = replace(stored_config(model), dtype=dtype_of(tensors))
    cast = build_empty(config)
    cast.load_state_dict(tensors, strict=False, assign=True)
    if config.tie_embeddings:
        cast.head.weight = cast.embedding.weight
    cast.generation_config = model.generation_config
    return cast.eval()


def stored_config(model: LanguageModel) -> ModelConfig:
    """The model's configuration, with its own dtype, tied head and end tokens, which may have changed since."""
    config, ids = model.config, model.eos_token_ids
    if ids != config.eos_token_ids:
        config = replace(config, eos_token_id=ids[0] if len(ids) == 1 else ids)
    return replace(config, tie_embeddings=_is_tied(model), dtype=dtype_of(model.state_dict()))


def stored_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """The model's state dict without a tied head, which is the embedding. Raises ValueError for a split model."""
    if model.shard is not None:
        raise ValueError(
            f"the model is {model.shard} of a split model; accepted: a whole one, which whole_model of "
            "retnet.models.parallel.whole makes of it"
        )
    absent = {"head.weight"} if _is_tied(model) else set()
    return {name: x for name, x in model.state_dict().items() if name not in absent}


def _is_tied(model: LanguageModel) -> bool:
    """Whether the head is the embedding; adapters that were merged may have untied them."""
    return model.config.tie_embeddings and model.head.weight is model.embedding.weight


def _config_json(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG_FILE
    if not directory.is_dir():
        raise FileNotFoundError(f"no saved model at {directory}: no such directory")
    if not file.is_file():
        raise FileNotFoundError(f"no saved model at {directory}: it has no {CONFIG_FILE}")
    return read_json(file)


def _model_config(directory: Path, data: dict[str, Any]) -> ModelConfig:
    file = directory / CONFIG_FILE
    model_type = data.get("model_type")
    if model_type != MODEL_TYPE or "model_config" not in data:
        raise ValueError(
            f"{file} is of model_type {model_type!r}; this reads models that retnet saved ({MODEL_TYPE!r}, with a "
            "model_config), and `retnet convert` converts those of other libraries"
        )
    generation = directory / GENERATION_FILE
    try:
        return merged(data["model_config"], data, read_json(generation) if generation.is_file() else None)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def dtype_of(weights: Mapping[str, Tensor]) -> Any:
    """The dtype of a model with these weights: the narrowest that holds its matrices.

    Norms, biases, routers and the parameters that mixers keep in float32 do not count.
    """
    wide = {*float32_parameters(), "router", "head_norm_weight"}
    matrices = [x.dtype for name, x in weights.items() if x.dim() > 1 and wide.isdisjoint(name.split("."))]
    return str(reduce(torch.promote_types, matrices)).removeprefix("torch.")


def _check_tensors(directory: Path, model: LanguageModel, tensors: Tensors) -> None:
    """Raise ValueError unless the tensors are those of the configuration, in their shapes."""
    wanted, held = stored_tensors(model), tensors.specs
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - held.keys())]
    problems += [f"{name} belongs to no layer" for name in sorted(held.keys() - wanted.keys())]
    problems += [
        f"{name} has shape {list(held[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in held and held[name].shape != tensor.shape
    ]
    problems += [f"{name} is {x.dtype}, not floating-point" for name, x in held.items() if not x.is_floating_point()]
    _refuse(directory, problems)


def _refuse(directory: Path, problems: list[str]) -> None:
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"the weights in {directory} are not those of its {CONFIG_FILE}: {shown}")
