"""Facts of a run that are known before its first step, as tables of text: model, data, settings, machine."""

from __future__ import annotations

import platform
from collections import Counter
from typing import Any

import torch
from transformers import TrainingArguments

from retnet import __version__
from retnet.data import Mixture
from retnet.models.config import ModelConfig
from retnet.models.cost import parameter_counts
from retnet.ops.device import num_threads
from retnet.system.machine import core_quota, cpu_name, package_versions, source_commit, usable_cores
from retnet.system.memory import total_bytes
from retnet.system.sizes import format_bytes
from retnet.train.inputs import RunData
from retnet.train.recipe import DEFAULTS, Recipe

Table = list[tuple[str, str]]
PACKAGES = ("transformers", "accelerate", "triton", "safetensors", "tokenizers", "datasets")


def run_tables(
    recipe: Recipe, arguments: TrainingArguments, data: RunData, config: ModelConfig, rows_per_step: int
) -> dict[str, Table]:
    """Tables by title; each is a list of names and values."""
    return {
        "Model": _model(recipe, config),
        "Data": _data(recipe, data),
        "Settings": _settings(recipe, arguments, rows_per_step),
        "Machine": _machine(arguments),
        "Software": _software(),
    }


def all_settings(recipe: Recipe, arguments: TrainingArguments) -> dict[str, Any]:
    """Every setting of the run, tokens for services masked."""
    return recipe.model_dump(mode="json", exclude={"training"}) | arguments.to_sanitized_dict()


def _model(recipe: Recipe, config: ModelConfig) -> Table:
    counts = parameter_counts(config)
    mixers = Counter(type(layer.mixer).__name__.removesuffix("Config") for layer in config.layers)
    return [
        ("model", str(recipe.model)),
        ("parameters", f"{counts['total']:,} ({counts['embedding']:,} embedding)"),
        ("layers", f"{len(config.layers)}: " + ", ".join(f"{count} of {name}" for name, count in mixers.items())),
        ("width", f"{config.d_model:,}"),
        ("vocabulary", f"{config.vocab_size:,}"),
    ]


def _data(recipe: Recipe, data: RunData) -> Table:
    shares = data.train.shares if isinstance(data.train, Mixture) else [1.0] * len(data.corpora)
    rows = []
    for (name, corpus), share in zip(data.corpora.items(), shares, strict=True):
        part = "" if len(data.corpora) == 1 else f"{share:.1%} of the tokens; "
        size = f"{corpus.num_bytes / 1e6:,.2f} MB, {len(corpus):,} documents, {corpus.num_tokens:,} tokens"
        rows.append((name, f"{part}{size}; fingerprint {corpus.fingerprint[:16]}"))
    for name, valid in data.valid.items():
        rows.append((f"validation: {name}", f"{valid.num_bytes / 1e6:,.2f} MB, {len(valid.corpus):,} documents"))
    tokenizer = data.corpus.tokenizer_id
    return [*rows, ("tokenizer", tokenizer[:16]), ("tokens per row", f"{recipe.length:,}")]


def _settings(recipe: Recipe, arguments: TrainingArguments, rows_per_step: int) -> Table:
    """The sizes of a step, and every setting that differs from the default of transformers or of ours."""
    values = arguments.to_sanitized_dict()
    given = {name for name in recipe.training if name not in DEFAULTS or recipe.training[name] != DEFAULTS[name]}
    shown = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "seed")
    names = [name for name in (*shown, *sorted(given - set(shown))) if name in values]
    own = recipe.model_dump(mode="json", exclude={"training", "model", "data", "length"}, exclude_defaults=True)
    rows = [("rows per step", f"{rows_per_step:,}"), ("tokens per step", f"{rows_per_step * recipe.length:,}")]
    return rows + [(name, str(value)) for name, value in {**own, **{name: values[name] for name in names}}.items()]


def _machine(arguments: TrainingArguments) -> Table:
    rows = []
    if arguments.device.type == "cuda":
        properties = torch.cuda.get_device_properties(arguments.device)
        memory = format_bytes(properties.total_memory, 3)
        rows.append(("GPU", f"{arguments.world_size} x {properties.name}, {memory} each"))
    elif arguments.world_size > 1:
        rows.append(("processes", f"{arguments.world_size}"))
    quota = core_quota()
    limit = "" if quota is None else f", limited to the time of {quota:g}"
    rows.append(("processor", f"{cpu_name()}, {usable_cores()} cores{limit}, {num_threads()}"))
    memory = total_bytes()
    return [*rows, *([("memory", format_bytes(memory, 3))] if memory else []), ("system", platform.platform())]


def _software() -> Table:
    cuda = getattr(torch.version, "cuda", None)
    commit = source_commit() or "unknown: not run from a checkout"
    return [
        ("retnet", __version__),
        ("commit", commit),
        ("python", platform.python_version()),
        ("torch", torch.__version__ + (f", CUDA {cuda}" if cuda else "")),
        *package_versions(PACKAGES).items(),
    ]
