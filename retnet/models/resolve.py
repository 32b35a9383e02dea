"""MODEL on a command line: the name of a preset or a saved directory, to a configuration or a model."""

from __future__ import annotations

from pathlib import Path

import torch

from retnet.models.config import ModelConfig
from retnet.models.directory import load_config, load_model
from retnet.models.lm import LanguageModel
from retnet.models.presets import PRESETS, preset


def resolve_config(name: str) -> ModelConfig:
    """The configuration that a name stands for; a preset goes before a directory of the same name.

    Raises ValueError or FileNotFoundError if it is neither, or a directory that holds no model of ours.
    """
    if name in PRESETS:
        return preset(name)
    _check_is_directory(name)
    return load_config(name)


def resolve_model(name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> LanguageModel:
    """The model that a name stands for, in evaluation mode: a preset with fresh weights, or a saved one.

    Raises as `resolve_config`, and ValueError for weights that are not those of the configuration.
    """
    if name in PRESETS:
        with torch.device(device):
            return LanguageModel(preset(name)).to(device, dtype).eval()
    _check_is_directory(name)
    return load_model(name, device=device, dtype=dtype)


def _check_is_directory(name: str) -> None:
    if not Path(name).exists():
        raise FileNotFoundError(
            f"no model {name!r}: it is neither a saved directory nor a preset ({', '.join(PRESETS)})"
        )
