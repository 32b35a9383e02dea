"""A model as a directory: `config.json` and safetensors, the layout that transformers writes and reads too.

    config.json        {"model_type": "retnet", "model_config": {...ModelConfig...}, ...}
    model.safetensors  tensors named model.<name in LanguageModel>; a tied head is not stored

Reading it needs no transformers. Larger models lie in several files with `model.safetensors.index.json`, which is read
here and written by `models/hf.py` alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from retnet.models.config import ModelConfig
from retnet.models.lm import LanguageModel

MODEL_TYPE = "retnet"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PREFIX = "model."


def save_model(model: LanguageModel, directory: str | os.PathLike[str]) -> None:
    """Write the model to a directory, made if missing. Weights are staged and renamed, so none is ever half-written."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        PREFIX + name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in _absent(model)
    }
    staged = directory / (WEIGHTS_FILE + ".part")
    save_file(tensors, staged, metadata={"format": "pt"})
    config = {
        "architectures": ["RetNetForCausalLM"],
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "model_config": model.config.to_dict(),
        "model_type": MODEL_TYPE,
    }
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    os.replace(staged, directory / WEIGHTS_FILE)


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

    dtype: of the weights; as saved if None.

    Raises FileNotFoundError or ValueError if the directory holds no model, one of something else, or one whose weights
    are missing, damaged, or not those of its configuration.
    """
    directory = Path(directory)
    config_json = _config_json(directory)
    config = _model_config(directory, config_json)
    saved_as = getattr(torch, str(config_json.get("dtype") or config.dtype), None)
    if not isinstance(saved_as, torch.dtype):
        raise ValueError(f"{directory / CONFIG_FILE}: dtype is {config_json['dtype']!r}, which torch does not have")
    with torch.device("meta"):
        model = LanguageModel(config)
    tensors = _read_tensors(directory, str(device))
    _check_tensors(directory, model, tensors)
    tensors = {name: tensor.to(dtype or saved_as) for name, tensor in tensors.items()}
    model.load_state_dict(tensors, strict=False, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model.eval()


def _absent(model: LanguageModel) -> set[str]:
    """Names in the state dict that are not stored, because they are other tensors."""
    return {"head.weight"} if model.config.tie_embeddings else set()


def _config_json(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG_FILE
    if not directory.is_dir():
        raise FileNotFoundError(f"no saved model at {directory}: no such directory")
    if not file.is_file():
        raise FileNotFoundError(f"no saved model at {directory}: it has no {CONFIG_FILE}")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON and Unicode errors are both ValueErrors
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} holds a {type(data).__name__}, a model's configuration is a mapping")
    return data


def _model_config(directory: Path, data: dict[str, Any]) -> ModelConfig:
    file = directory / CONFIG_FILE
    model_type = data.get("model_type")
    if model_type != MODEL_TYPE or "model_config" not in data:
        raise ValueError(f"{file} is of model_type {model_type!r}; this reads models that retnet saved ({MODEL_TYPE!r})")
    try:
        return ModelConfig.from_dict(data["model_config"])
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _read_tensors(directory: Path, device: str) -> dict[str, Tensor]:
    """All tensors by their name in LanguageModel."""
    files = [directory / WEIGHTS_FILE]
    if not files[0].is_file() and (directory / INDEX_FILE).is_file():
        index = json.loads((directory / INDEX_FILE).read_text())
        files = [directory / name for name in sorted(set(index["weight_map"].values()))]
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{directory} has a {CONFIG_FILE} but no weights: {file.name} is missing")
        try:
            with safe_open(file, "pt", device=device) as stream:
                for name in stream.keys():  # noqa: SIM118 (not a mapping)
                    tensors[name.removeprefix(PREFIX)] = stream.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from error
    return tensors


def _check_tensors(directory: Path, model: LanguageModel, tensors: dict[str, Tensor]) -> None:
    """Every tensor that the configuration asks for is there, in its shape, and no other."""
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name not in _absent(model)}
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - tensors.keys())]
    problems += [f"{name} belongs to no layer" for name in sorted(tensors.keys() - wanted.keys())]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"the weights in {directory} are not those of its {CONFIG_FILE}: {shown}")
