"""Model names as users write them: a preset, a stack file, or a saved directory."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import torch

from retnet.data.tokenizer import DOCUMENT_START, Tokenizer
from retnet.data.tokenizer_json import tokenizer_of_model
from retnet.models.config import ModelConfig
from retnet.models.directory import CONFIG_FILE, load_config, load_model
from retnet.models.lm import LanguageModel
from retnet.models.presets import PRESETS, is_preset, preset
from retnet.ops.device import resolve_device
from retnet.system.suggest import did_you_mean_path

from .build import model_config
from .load import Stack, load_stack, parse_stack
from .presets import load_preset, preset_names

STACK_SUFFIXES = (".yml", ".yaml")


def is_stack_file(name: str) -> bool:
    """Whether a name is that of a stack file, by its end."""
    return name.endswith(STACK_SUFFIXES)


def model_label(name: str) -> str:
    """A short name of a model, for the API and for paths: its preset, its directory, or its stack file without suffix.

    "retnet-1.3b" is whole: only the suffix of a stack file is cut.
    """
    path = Path(name)
    if is_stack_file(name):
        return path.stem
    return path.resolve().name if path.name in ("", "..") else path.name


def written_stack(name: str) -> Stack | None:
    """The stack preset or stack file of a name, None for other names. Raises StackError for a file with faults."""
    if name in preset_names():
        return load_preset(name)
    return load_stack(name) if is_stack_file(name) else None


def resolve_stack(name: str) -> Stack | None:
    """The stack of a preset, a file, or a saved model that was compiled from a stack; None if there is none.

    Raises StackError for a file with faults, ValueError or FileNotFoundError for a directory without a retnet model.
    """
    stack = written_stack(name)
    if stack is not None or is_preset(name) or not Path(name).is_dir():
        return stack
    source = load_config(name).source
    return None if source is None else parse_stack(source, name)


def resolve_config(name: str) -> ModelConfig:
    """The configuration of a named model. A preset takes precedence over a file or directory of the same name.

    Raises ValueError (StackError among them) or FileNotFoundError if the name is not that of a retnet model.
    """
    if is_preset(name):
        return preset(name)
    stack = written_stack(name)
    if stack is not None:
        return model_config(stack)
    _check_exists(name)
    return load_config(name)


def resolve_model(
    name: str, *, seed: int | None = None, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> LanguageModel:
    """The named model in evaluation mode: with new weights for a preset or a stack, otherwise with the saved ones.

    seed: replaces the seed of a preset's weights. The seed of a stack is in its file.
    device: "auto" is the GPU, if there is one.

    Raises the errors of `resolve_config`, and ValueError for weights that do not fit the configuration or a device that
    does not exist.
    """
    device = resolve_device(device)
    if saved_directory(name) is None:
        config = resolve_config(name)
        if seed is not None and is_preset(name):
            config = replace(config, seed=seed)
        with torch.device(device):
            return LanguageModel(config).to(device, dtype).eval()
    _check_exists(name)
    return load_model(name, device=device, dtype=dtype)


def resolve_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a named model. Raises the errors of `resolve_config` and `tokenizer_of`."""
    return tokenizer_of(resolve_config(name), saved_directory(name))


def tokenizer_of(config: ModelConfig, directory: Path | None) -> Tokenizer:
    """The tokenizer of a model: the one saved in its `directory`, otherwise bytes.

    Raises ValueError for a model that has no tokenizer and whose vocabulary is not bytes.
    """
    return tokenizer_of_model(
        config.name if directory is None else str(directory),
        directory,
        config.vocab_size,
        bos=config.bos_token_id,
        eos=next(iter(config.eos_token_ids), None),
        reads_bytes=config.source is not None and config.bos_token_id == DOCUMENT_START,  # a stack's byte tokenizer
    )


def saved_directory(name: str) -> Path | None:
    """The directory of a name; None for presets and stacks, which take precedence over a directory of the same name.

    Warns where there is a model in that directory.
    """
    is_new = is_preset(name) or name in preset_names() or is_stack_file(name)
    if is_new and (Path(name) / CONFIG_FILE).is_file():
        warnings.warn(
            f"{name!r} is the preset, not the model in the directory {name}; that one is ./{name}", stacklevel=3
        )
    return None if is_new else Path(name)


def _check_exists(name: str) -> None:
    if not Path(name).exists():
        raise FileNotFoundError(
            f"no model {name!r}; accepted: a preset (`retnet info` lists them), a stack file "
            f"({', '.join(STACK_SUFFIXES)}), or a saved directory"
            f"{did_you_mean_path(name, (*PRESETS, *preset_names()))}"
        )
