"""Recipes: a model, data and the fields of transformers' TrainingArguments in one flat mapping.

A recipe is a YAML file, `key=value` arguments, or both; arguments override the file. Every key is a field of `Recipe`
or of TrainingArguments, and a misspelt one is an error that names the nearest key. `DEFAULTS` fills in the rest.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from transformers import TrainingArguments

from retnet.layers.recompute import Level, Recompute
from retnet.models.directory import load_config
from retnet.stack.document import MAX_BYTES, Document, compose
from retnet.stack.errors import StackError
from retnet.stack.load import Stack
from retnet.stack.resolve import model_label, resolve_stack, saved_directory
from retnet.stack.training import optimizer_groups, router_lr_multiplier, training_defaults
from retnet.system.suggest import choices, did_you_mean_path, nearest
from retnet.train.float8 import Float8, check_float8
from retnet.train.muon_recipe import MUON, MuonArgs
from retnet.train.parameter_patterns import Algorithm
from retnet.train.state_recipe import STATE, STATE_DEFAULTS, Method, excluded

CheckpointForm = Literal["whole", "sharded", "async"]

# The optimizer's values are the paper's (section 3.1 and its table of hyperparameters: betas, weight decay, clipping,
# linear decay). The others make sure that a run keeps its work and reports its failures.
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
    "model": "the name of a preset (such as retnet-tiny), a stack file, or a saved directory",
    "data": "a folder written by `retnet data`, a file or folder of text, jsonl with messages, or stdlib; or several "
    "with their weights",
}
# Fields of TrainingArguments that would have no effect, because rows, their order and the loss are ours.
WITHOUT_EFFECT = {
    "accelerator_config": "rows are assigned to processes by their number",
    "auto_find_batch_size": "the number of rows per step is part of a run's identity",
    "bf16_full_eval": "validation runs as training does",
    "dataloader_drop_last": "no row is left out",
    "do_train": "this command trains; `retnet eval` validates",
    "enable_jit_checkpoint": "a SIGTERM always saves",
    "fp16_full_eval": "validation runs as training does",
    "ignore_data_skip": "a resumed run continues with the rows that come next",
    "label_smoothing_factor": "the loss is cross-entropy",
    "length_column_name": "all rows have the same length",
    "liger_kernel_config": "the loss already avoids the logits of all tokens at once",
    "save_only_model": "a checkpoint must be complete to resume from it",
    "train_sampling_strategy": "data_seed determines the order of rows",
    "use_liger_kernel": "the loss already avoids the logits of all tokens at once",
}
# Fields that accept more types than TrainingArguments declares.
_BOOL_OR_WORD = Annotated[bool | str, Field(union_mode="left_to_right")]
_HINTS: dict[str, Any] = {"fsdp": _BOOL_OR_WORD, "resume_from_checkpoint": _BOOL_OR_WORD}
_CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")  # older and newer name of one field
_COMPILE = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
# Minimums that TrainingArguments does not validate, and a value that means "no limit".
_MINIMUMS: dict[str, tuple[float, float | None]] = {
    "adam_epsilon": (0, None),
    "dataloader_num_workers": (0, None),
    "eval_delay": (0, None),
    "gradient_accumulation_steps": (1, None),
    "learning_rate": (0, None),
    "max_grad_norm": (0, None),
    "max_steps": (1, -1),
    "per_device_eval_batch_size": (1, None),
    "per_device_train_batch_size": (1, None),
    "save_total_limit": (1, 0),
    "warmup_steps": (0, None),
    "weight_decay": (0, None),
}
_POSITIVE = ("eval_steps", "logging_steps", "num_train_epochs", "save_steps")
_EXPONENT_FORM = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_MAPPINGS = ("data", "optimizer_groups")  # keys of ours that take a mapping
_METRICS = ("loss", "perplexity", "bits_per_byte")


Source = Annotated[str, Field(min_length=1)]  # an empty one, as from an unset variable, would be the current folder
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Recipe(BaseModel):
    """The settings of a training run.

    model: the name of a preset, a stack file, or a saved directory to train further.
    data: a folder of shards, a file or folder of text, jsonl with `messages`, or `stdlib`; or a mapping of several to
        their shares of tokens.
    valid: one source for validation, instead of a share of the documents of `data`.
    method: `weights` trains the model; `state` trains only the state that every document starts from, which is saved
        as `state.safetensors` for `retnet generate` and `retnet serve`.
    length: tokens per row. Longer documents are cut into pieces, each of which starts from an empty state.
    context_parallel: processes that share rows: each holds as many contiguous tokens, a part of a row or whole rows.
    carry_state: each piece starts from the state at the end of the piece before instead.
    valid_fraction: the share of documents held out for validation if `valid` is not given.
    valid_rows: validate on at most this many rows, spread evenly over each validation source; None: on all of them.
    chat_template: for conversations, `plain` or a file with a Jinja template; the model's own by default, else plain.
    max_minutes: a time limit on training, resumed parts included; the learning-rate schedule ends with it.
    num_samples: the number of validation documents to write continuations of at the end.
    router_lr_multiplier: the learning rate of MoE routers, divided by that of all other parameters.
    optimizer_groups: with optim=muon, patterns of the names of parameters that each of `muon` and `adamw` trains.
    checkpoints: `whole`: a model directory beside the Trainer's states; `sharded`: each process writes its share, which
        any number of processes resume; `async`: sharded, written while training goes on. None: as fsdp_config says, or
        whole.
    force: replace the model of an earlier run in output_dir.
    float8: scaling of the products of linear layers in float8 (`retnet.train.float8`); None: products as bf16 says.
    recompute: what the backward computes again (`retnet.layers.recompute`); None: layers if gradient_checkpointing is
        true or the stack says so, otherwise nothing. offload: with recompute "layer", their inputs wait on the host.
    training: fields of TrainingArguments, completed from the training_hints of a stack, then from `DEFAULTS`; bf16 is
        true by default for a model of bfloat16.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: Source
    data: Source | Annotated[dict[Source, Weight], Field(min_length=1)]
    valid: Source | None = None
    method: Method = "weights"
    length: int = Field(default=1024, ge=2)
    context_parallel: int = Field(default=1, ge=1)
    carry_state: bool = False
    valid_fraction: float = Field(default=0.05, gt=0, lt=1)
    valid_rows: int | None = Field(default=None, ge=1)
    chat_template: Source | None = None
    max_minutes: float | None = Field(default=None, gt=0)
    num_samples: int = Field(default=3, ge=0)
    router_lr_multiplier: float = Field(default=1.0, ge=0)
    optimizer_groups: dict[Algorithm, list[Source]] | None = None
    checkpoints: CheckpointForm | None = None
    force: bool = False
    float8: Float8 | None = None
    recompute: Level | None = None
    offload: bool = False
    training: dict[str, Any]

    def training_arguments(self) -> TrainingArguments:
        """The arguments for the Trainer. Raises ValueError for a combination that transformers refuses.

        Compilation arguments are left out: blocks are compiled one by one (`compile_options`), not the whole model.
        """
        # Without CUDA, pinning memory only causes a warning, and bf16 and gloo need an explicit use_cpu. The Trainer
        # would also choose a Mac's GPU, for which the operators have no kernels.
        device = {"dataloader_pin_memory": torch.cuda.is_available(), "use_cpu": not torch.cuda.is_available()}
        values: dict[str, Any] = {**device, **self.training}
        is_muon = values.get("optim") == MUON
        left_out = (*_COMPILE, "optim") if is_muon else _COMPILE
        try:
            arguments = TrainingArguments(**{key: value for key, value in values.items() if key not in left_out})
        except (ImportError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"TrainingArguments does not accept these values: {error}") from error
        if is_muon:  # a name that transformers does not have
            arguments.optim = MUON
        return arguments

    @property
    def compile_options(self) -> dict[str, str] | None:
        """Arguments for torch.compile; None without compilation."""
        wanted, backend, mode = (self.training.get(key) for key in _COMPILE)
        if not (wanted or backend or mode):
            return None
        return {key: value for key, value in (("backend", backend), ("mode", mode)) if value}

    def recomputed(self, usual: Level) -> Recompute:
        """What training recomputes, where the model's own choice is `usual`. Raises ValueError for a contradiction."""
        by_layer = [key for key in _CHECKPOINTING if self.training.get(key)]
        if by_layer and self.recompute not in (None, "layer"):
            raise ValueError(f"recompute is {self.recompute!r} with {by_layer[0]} true; accepted: one of the two")
        return Recompute(self.recompute or ("layer" if by_layer else usual), self.offload)

    @property
    def weights(self) -> dict[str, float]:
        """The sources of `data` and their shares."""
        return {self.data: 1.0} if isinstance(self.data, str) else self.data


def load_recipe(file: str | os.PathLike[str] | None, overrides: Iterable[str] = (), **sugar: Any) -> Recipe:
    """A recipe from a YAML file, overridden by `key=value` arguments and keyword arguments that are not None.

    Raises FileNotFoundError if the file does not exist, and one ValueError that names everything not accepted.
    """
    values = _read_recipe(Path(file)) if file is not None else {}
    values |= _read_arguments(overrides, {key: value for key, value in sugar.items() if value is not None})
    own = set(Recipe.model_fields) - {"training"}
    hints = get_type_hints(TrainingArguments) | _HINTS
    values = {key: _parsed(key, value, hints.get(key)) for key, value in values.items()}
    fields = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
    problems = [_unknown(key, own | fields.keys()) for key in values if key not in own | fields.keys()]
    problems += [f"{key} is not accepted: {WITHOUT_EFFECT[key]}" for key in values if key in WITHOUT_EFFECT]
    problems += [f"{key} is missing: {meaning}" for key, meaning in _REQUIRED.items() if key not in values]
    stack = resolve_stack(str(values["model"])) if "model" in values else None
    tunes_state = values.get("method") == STATE
    training = DEFAULTS | (STATE_DEFAULTS if tunes_state else {})
    if stack is not None:
        training |= training_defaults(stack.spec, values)
        values.setdefault("router_lr_multiplier", router_lr_multiplier(stack.spec))
    for key in sorted(values.keys() & fields.keys()):
        try:
            training[key] = _coerce(hints[key], values[key])
        except ValidationError as error:
            problems.append(f"{key} is {values[key]!r}: {error.errors()[0]['msg']}")
            continue
        accepted = fields[key].metadata.get("choices") or _words_of(key, hints[key])
        if accepted and training[key] is not None and training[key] not in accepted:
            problems.append(f"{key} is {training[key]!r}; {choices(training[key], accepted)}")
    if "bf16" not in values and not training.get("fp16") and "model" in values:
        training |= _precision(str(values["model"]), stack)
    if stack is not None and training.get("optim") == MUON and (groups := optimizer_groups(stack.spec)):
        values.setdefault("optimizer_groups", groups)
    if values.get("optimizer_groups") and training.get("optim") != MUON:
        problems.append(f"optimizer_groups with optim {training.get('optim')!r}; accepted with it: {MUON!r}")
    problems += _unusable(training)
    problems += excluded(values, training) if tunes_state else ()
    if not problems:
        model = str(values["model"])
        name = model_label(model)
        training.setdefault("output_dir", str(Path("out") / (f"{name}-state" if tunes_state else name)))
        if Path(training["output_dir"]).resolve() == Path(model).resolve():
            raise ValueError(f"output_dir is {training['output_dir']}, the folder of the model; accepted: another")
        try:
            recipe = Recipe(training=training, **{key: values[key] for key in own & values.keys()})
            recipe.recomputed("layer")
            if recipe.float8 is not None:
                rows = training.get("per_device_train_batch_size", TrainingArguments.per_device_train_batch_size)
                tokens = rows * recipe.length // recipe.context_parallel
                check_float8(recipe.float8, bool(training.get("bf16")), tokens)
            return recipe
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc']))} is {e['input']!r}: {e['msg']}" for e in error.errors()]
            if any(e["loc"][0] == "data" for e in error.errors()):  # one fault per type that data may have
                problems = [problem for problem in problems if not problem.startswith("data.")]
                problems.append(f"data is {values['data']!r}; accepted: a source, or sources with shares above 0")
    raise ValueError("; ".join(problems))


def _precision(model: str, stack: Stack | None) -> dict[str, Any]:
    """bf16 for a model of bfloat16: its weights are float32 in training, and its products stay bfloat16."""
    saved = saved_directory(model)
    if saved is not None and saved.is_dir():
        dtype = load_config(saved).dtype
    else:
        dtype = "float32" if stack is None else stack.spec.model.dtype
    return {"bf16": True} if dtype == "bfloat16" else {}


def _unusable(training: Mapping[str, Any]) -> list[str]:
    """Faults of settings that would otherwise fail late or have no effect."""
    problems = []
    for key, value in training.items():
        if not isinstance(value, int | float):
            continue
        minimum, no_limit = _MINIMUMS.get(key, (-math.inf, None))
        if not math.isfinite(value):
            problems.append(f"{key} is {value}; accepted: a finite number")
        elif value < minimum and value != no_limit:
            also = "" if no_limit is None else f", or {no_limit:g} for no limit"
            problems.append(f"{key} is {value}; accepted: {minimum:g} or more{also}")
        elif key in _POSITIVE and value <= 0:
            problems.append(f"{key} is {value}; accepted: a number above 0")
    if training.get("optim") == MUON:
        try:
            MuonArgs.parse(training.get("optim_args"))
        except ValueError as error:
            problems.append(str(error))
    if training.get("output_dir") == "":
        problems.append("output_dir is empty; accepted: a folder")
    best = training.get("metric_for_best_model")
    if best is not None and not best.endswith(_METRICS):
        problems.append(f"metric_for_best_model is {best!r}; {choices(best, (f'eval_{name}' for name in _METRICS))}")
    if training.get("load_best_model_at_end") and str(training.get("eval_strategy", "no")) == "no":
        problems.append("load_best_model_at_end is True without validation; accepted: False, or an eval_strategy")
    backend, mode = (training.get(f"torch_compile_{what}") for what in ("backend", "mode"))
    if backend is not None and backend not in torch.compiler.list_backends(exclude_tags=()):
        problems.append(f"torch_compile_backend is {backend!r}; {choices(backend, torch.compiler.list_backends())}")
    if mode is not None and mode not in (modes := ("default", *torch._inductor.list_mode_options())):
        problems.append(f"torch_compile_mode is {mode!r}; {choices(mode, dict.fromkeys(modes))}")
    return problems


def _read_recipe(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(
            f"no such recipe: {file} (arguments with '=' are settings, one without is a recipe file)"
            f"{did_you_mean_path(file)}"
        )
    data = file.read_bytes()
    if len(data) > MAX_BYTES:
        raise ValueError(f"{file} has {len(data)} bytes; accepted: a recipe of at most {MAX_BYTES}")
    try:
        values = _strict_yaml(data.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is not a recipe: {error}") from error
    if not isinstance(values, dict):
        found = {"NoneType": "nothing", "str": "text", "list": "a list"}.get(type(values).__name__, repr(values))
        raise ValueError(f"{file} holds {found}; accepted: a mapping of keys to values")
    return values


def _read_arguments(words: Iterable[str], sugar: dict[str, Any]) -> dict[str, Any]:
    """Settings from `key=value` arguments and from options. Raises ValueError for a key that is given twice."""
    values = dict(sugar)
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ValueError(f"{word!r} is given as a setting; accepted: key=value")
        if key in values:
            raise ValueError(f"{key} is given twice, as {values[key]!r} and {text!r}; accepted: once")
        values[key] = text
    return values


def _strict_yaml(text: str) -> Any:
    """The value of YAML text, by the rules of stack files: bounded, and without repeated keys. Raises ValueError.

    In lists and mappings, text such as 1e-4 is a number; YAML 1.1 wants a point and a sign in it (1.0e-4).
    """
    document = Document()
    try:
        document = compose(text)
        faults = document.faults
    except StackError as error:
        faults = list(error.faults)
    if faults:
        places = (f" (line {f.mark.line}, column {f.mark.column})" if f.mark else "" for f in faults)
        raise ValueError("; ".join(f"{f.what}{place}: {f.fix}" for f, place in zip(faults, places, strict=True)))
    root = document.root
    return {key: _with_numbers(value) for key, value in root.items()} if isinstance(root, dict) else root


def _with_numbers(value: Any, *, nested: bool = False) -> Any:
    if isinstance(value, dict):
        return {key: _with_numbers(part, nested=True) for key, part in value.items()}
    if isinstance(value, list):
        return [_with_numbers(part, nested=True) for part in value]
    return float(value) if nested and isinstance(value, str) and _EXPONENT_FORM.fullmatch(value) else value


def _parsed(key: str, value: Any, hint: Any) -> Any:
    """A setting; where a list or mapping is accepted, text that starts like one is read as one."""
    kinds = get_args(hint) or (hint,)
    is_collection = any((get_origin(kind) or kind) in (dict, list) for kind in kinds)
    starts = ("[", "{") if is_collection else ("{",) if key in _MAPPINGS else ()
    if not isinstance(value, str) or not value.lstrip().startswith(starts):
        return value
    try:
        return _with_numbers(_strict_yaml(value))
    except ValueError as error:
        raise ValueError(f"{key} is {value!r}, which starts like YAML but cannot be read: {error}") from error


def _coerce(hint: Any, value: Any) -> Any:
    """A value converted to its type in TrainingArguments; YAML's `no` may mean the word. Raises ValidationError."""
    adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        return adapter.validate_python(value)
    except ValidationError:
        if value is False:
            return adapter.validate_python("no")
        raise


def _words_of(key: str, hint: Any) -> list[str]:
    """The words of an enumeration in a hint, such as those of `IntervalStrategy | str`; none for other hints."""
    enums = (each for each in get_args(hint) if isinstance(each, type) and issubclass(each, Enum))
    words = [str(member.value) for each in enums for member in each]
    return [*words, MUON] if key == "optim" else words


def _unknown(key: str, known: set[str]) -> str:
    near = nearest(key, sorted(known))
    hint = (
        f"did you mean {near!r}?"
        if near
        else f"accepted: {', '.join(name for name in Recipe.model_fields if name != 'training')}, "
        "TrainingArguments' fields"
    )
    return f"unknown key {key!r}, {hint}"
