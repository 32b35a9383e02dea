"""What a training run is: a model, data, and the fields of transformers' TrainingArguments, in one flat mapping.

A recipe is a YAML file, `key=value` words, or both (the words win). It is closed: every key is a field below or a field
of TrainingArguments, and a misspelt one is an error that names the nearest. What nobody sets comes from `DEFAULTS`.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from transformers import TrainingArguments

from retnet.stack.resolve import resolve_stack
from retnet.stack.training import router_lr_multiplier, training_defaults

# The optimizer is the paper's (section 3.1 and its table of hyperparameters: betas, weight decay, clipping, linear
# decay); the rest is what a run needs that must not lose its work or hide its failures.
DEFAULTS: dict[str, Any] = {
    "ddp_find_unused_parameters": False,
    "adam_beta2": 0.98,
    "weight_decay": 0.05,
    "max_grad_norm": 2.0,
    "lr_scheduler_type": "linear",
    "learning_rate": 1e-3,
    "warmup_steps": 0.05,
    "num_train_epochs": 1.0,
    "logging_steps": 10,
    "logging_first_step": True,
    "logging_nan_inf_filter": False,
    "do_eval": True,
    "prediction_loss_only": True,
    "save_total_limit": 2,
    "disable_tqdm": True,
    "report_to": "none",
    "seed": 0,
}

_REQUIRED = {
    "model": "a preset's name (such as retnet-tiny), a stack's file, or a saved directory",
    "data": "a folder that `retnet data` wrote, a file or folder of text, or stdlib; or several with their weights",
}
# Fields of TrainingArguments that would be without effect, as rows, their order and the loss are ours.
_WITHOUT_EFFECT = {
    "accelerator_config": "rows are dealt out by their number",
    "auto_find_batch_size": "the number of rows in a step is part of what a run is",
    "dataloader_drop_last": "no row is left out",
    "enable_jit_checkpoint": "a SIGTERM always saves",
    "ignore_data_skip": "a resumed run goes on with the rows that come next",
    "label_smoothing_factor": "the loss is cross-entropy",
    "length_column_name": "rows are of one length",
    "train_sampling_strategy": "rows come in the order of data_seed",
    "use_liger_kernel": "the loss makes no logits of all tokens already",
}
# Where TrainingArguments take more than they declare.
_BOOL_OR_WORD = Annotated[bool | str, Field(union_mode="left_to_right")]
_HINTS: dict[str, Any] = {"fsdp": _BOOL_OR_WORD, "resume_from_checkpoint": _BOOL_OR_WORD}
_COMPILE = ("torch_compile", "torch_compile_backend", "torch_compile_mode")


Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Recipe(BaseModel):
    """A training run.

    model: a preset's name, a stack's file, or a saved directory to go on from.
    data: a folder of shards, a file or folder of text, or `stdlib`; or a mapping of several to their shares of tokens.
    valid: the same for validation, in place of a share of `data`.
    length: tokens in a row; longer documents are cut into pieces that start fresh.
    carry_state: pieces start from the state that the one before ended with instead.
    valid_fraction: share of the documents held out where `valid` does not name others.
    max_minutes: of training, over all its parts; the schedule then ends with them if they are over before the steps.
    num_samples: continuations of validation documents that are written at the end.
    router_lr_multiplier: learning rate of MoE routers over that of everything else.
    training: fields of TrainingArguments, defaults filled in: those of a stack's training_hints, then `DEFAULTS`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    data: str | dict[str, Weight]
    valid: str | None = None
    length: int = Field(default=1024, ge=2)
    carry_state: bool = False
    valid_fraction: float = Field(default=0.05, gt=0, lt=1)
    max_minutes: float | None = Field(default=None, gt=0)
    num_samples: int = Field(default=3, ge=0)
    router_lr_multiplier: float = Field(default=1.0, ge=0)
    training: dict[str, Any]

    def training_arguments(self) -> TrainingArguments:
        """The arguments for the Trainer. Raises ValueError for a combination that transformers refuses.

        Without those of compilation: blocks are compiled one by one (`compile_options`), not the model as a whole.
        """
        # Pinning without an accelerator is a warning and nothing else; bf16 and gloo want the CPU to be asked for.
        device = {"dataloader_pin_memory": torch.cuda.is_available(), "use_cpu": not torch.accelerator.is_available()}
        values: dict[str, Any] = {**device, **self.training}
        return TrainingArguments(**{key: value for key, value in values.items() if key not in _COMPILE})

    @property
    def compile_options(self) -> dict[str, str] | None:
        """Arguments for torch.compile; None if nothing is to be compiled."""
        wanted, backend, mode = (self.training.get(key) for key in _COMPILE)
        if not (wanted or backend or mode):
            return None
        return {key: value for key, value in (("backend", backend), ("mode", mode)) if value}

    @property
    def weights(self) -> dict[str, float]:
        """The sources of `data` and their shares."""
        return {self.data: 1.0} if isinstance(self.data, str) else self.data


def load_recipe(file: str | os.PathLike[str] | None, overrides: Iterable[str] = (), **sugar: Any) -> Recipe:
    """A recipe from a YAML file, then `key=value` words, then keyword arguments that are not None.

    Raises FileNotFoundError if there is no such file, ValueError for anything in it that is not accepted, all at once.
    """
    values = _read_yaml(Path(file)) if file is not None else {}
    values |= dict(map(_parse_override, overrides))
    values |= {key: value for key, value in sugar.items() if value is not None}
    own = set(Recipe.model_fields) - {"training"}
    if isinstance(values.get("data"), str) and values["data"].lstrip().startswith("{"):
        values["data"] = yaml.safe_load(values["data"])
    hints = get_type_hints(TrainingArguments)
    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    problems = [_unknown(key, own | fields) for key in values if key not in own | fields]
    problems += [f"{key} is not accepted: {_WITHOUT_EFFECT[key]}" for key in values if key in _WITHOUT_EFFECT]
    problems += [f"{key} is missing: {meaning}" for key, meaning in _REQUIRED.items() if key not in values]
    stack = resolve_stack(str(values["model"])) if "model" in values else None
    training = dict(DEFAULTS)
    if stack is not None:
        training |= training_defaults(stack.spec, values)
        values.setdefault("router_lr_multiplier", router_lr_multiplier(stack.spec))
    for key in sorted(values.keys() & fields):
        try:
            training[key] = _coerce(_HINTS.get(key, hints[key]), values[key])
        except ValidationError as error:
            problems.append(f"{key} is {values[key]!r}: {error.errors()[0]['msg']}")
    if not problems:
        training.setdefault("output_dir", str(Path("out") / Path(str(values["model"])).stem))
        try:
            return Recipe(training=training, **{key: values[key] for key in own & values.keys()})
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc']))} is {e['input']!r}: {e['msg']}" for e in error.errors()]
    raise ValueError("; ".join(problems))


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(
            f"no such recipe: {file} (words with '=' are settings, another word is a recipe's file)"
        )
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{file} holds a {type(values).__name__}; a recipe is a mapping of keys to values")
    return {str(key): value for key, value in values.items()}


def _parse_override(word: str) -> tuple[str, str]:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ValueError(f"{word!r} is not key=value")
    return key, text


def _coerce(hint: Any, value: Any) -> Any:
    """A value as TrainingArguments types it; a word may be YAML for a list, and YAML's `no` is the word, not False.

    Raises ValidationError.
    """
    adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = yaml.safe_load(value)
    try:
        return adapter.validate_python(value)
    except ValidationError:
        if value is False:
            return adapter.validate_python("no")
        raise


def _unknown(key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.6)
    hint = (
        f"did you mean {near[0]!r}?"
        if near
        else f"accepted: {', '.join(name for name in Recipe.model_fields if name != 'training')}, "
        "TrainingArguments' fields"
    )
    return f"unknown key {key!r}, {hint}"
