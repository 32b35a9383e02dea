"""Changes of settings when a run is resumed: free, said, or refused.

Every key of a recipe is in one class. Keys in `FREE` have no effect on the steps that follow, except for rounding.
Changes of keys in `SAID` apply from the next step, and are printed in one line; a key that this table does not know is
one of them. Keys in `REFUSED` decide a fact about the run that a checkpoint has in it: its weights, the rows that come
next, or its optimizer. A checkpoint can only be resumed by a run of equal facts, so two settings that give equal facts
(batch size x accumulation steps) may replace each other.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from retnet.data import Mixture
from retnet.models.shards import is_sharded
from retnet.train.inputs import RunData
from retnet.train.packed_model import PackedForCausalLM
from retnet.train.recipe import WITHOUT_EFFECT, Recipe
from retnet.train.resume import read_run
from retnet.train.state_tuning import StateTunedForCausalLM


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


FREE = _names(
    # how steps are computed
    "activation_checkpointing activation_checkpointing_kwargs context_parallel dataloader_in_order "
    "dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory "
    "dataloader_prefetch_factor ddp_backend "
    "ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout "
    "force full_determinism gradient_checkpointing gradient_checkpointing_kwargs local_rank offload recompute "
    "torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps use_cache "
    # validation and samples
    "batch_eval_metrics do_eval do_predict eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start "
    "eval_steps eval_strategy eval_use_gather_object include_for_metrics label_names num_samples "
    "per_device_eval_batch_size prediction_loss_only remove_unused_columns "
    # log and reports
    "debug disable_tqdm include_num_input_tokens_seen log_level log_level_replica log_on_each_node logging_first_step "
    "logging_nan_inf_filter logging_steps logging_strategy project report_to run_name skip_memory_metrics "
    "trackio_bucket_id trackio_space_id trackio_static_space_id "
    # checkpoints
    "checkpoints hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token "
    "load_best_model_at_end output_dir push_to_hub restore_callback_states_from_checkpoint resume_from_checkpoint "
    "save_on_each_node save_steps save_strategy save_total_limit"
)
SAID = _names(
    "average_tokens_across_devices deepspeed lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_minutes max_steps "
    "neftune_noise_alpha num_train_epochs parallelism_config tf32 use_cpu valid valid_rows warmup_steps"
)
# Keys and the facts that they decide.
REFUSED = {
    "model": "model",
    "method": "method",
    "data": "data",
    "valid_fraction": "data",
    "chat_template": "data",
    "length": "length",
    "per_device_train_batch_size": "rows_per_step",
    "gradient_accumulation_steps": "rows_per_step",
    "seed": "data_seed",
    "data_seed": "data_seed",
    "fsdp": "sharding",
    "fsdp_config": "sharding",
    **{
        key: key
        for key in _names(
            "carry_state learning_rate optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 "
            "adam_epsilon router_lr_multiplier optimizer_groups bf16 fp16 float8 metric_for_best_model "
            "greater_is_better"
        )
    },
}
# Facts that a run may get which had none: there was no best checkpoint before.
_MAY_BEGIN = ("metric_for_best_model", "greater_is_better")
_STATEFUL_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
_NOT_COMPARED = ("gradient_checkpointing", "name", "seed", "source")  # of ModelConfig: the weights are the checkpoint's
_SHOWN = 5


def run_facts(recipe: Recipe, arguments: TrainingArguments, data: RunData, model: PackedForCausalLM) -> dict[str, Any]:
    """What a run must share with a checkpoint to resume from it, as plain JSON values."""
    settings = arguments.to_dict() | recipe.model_dump(exclude={"training"})
    shares = data.train.shares if isinstance(data.train, Mixture) else [1.0]
    schedule = {key: settings[key] for key in ("lr_scheduler_type", "lr_scheduler_kwargs")}
    facts: dict[str, Any] = {
        "model": {k: v for k, v in model.model.config.to_dict().items() if k not in _NOT_COMPARED},
        "data": [
            {"source": name, "share": share, "fingerprint": corpus.fingerprint}
            for (name, corpus), share in zip(data.corpora.items(), shares, strict=True)
        ],
        "rows_per_step": arguments.train_batch_size
        * arguments.gradient_accumulation_steps
        * (arguments.world_size // recipe.context_parallel),
        "method": None if model.trains_weights else recipe.method,
        "data_seed": arguments.seed if arguments.data_seed is None else arguments.data_seed,
        "sharding": "whole" if arguments.fsdp else None,  # of no matter to a sharded checkpoint
        # A schedule that is not a function of the step has a state, which a checkpoint restores with its arguments.
        "schedule": schedule if settings["lr_scheduler_type"] in _STATEFUL_SCHEDULES else "a function of the step",
    }
    if isinstance(model, StateTunedForCausalLM):
        facts["weights"] = model.base
    if recipe.carry_state:  # each process keeps its lanes
        facts["lanes"] = [arguments.train_batch_size] * arguments.world_size
    facts |= {fact: settings[fact] for fact in REFUSED.values() if fact not in facts}
    return json.loads(json.dumps(facts, default=str))


def said_settings(recipe: Recipe, arguments: TrainingArguments) -> dict[str, Any]:
    """The settings of a run whose changes are said, as plain JSON values."""
    settings = arguments.to_dict() | recipe.model_dump(exclude={"training"})
    fields = {field.name for field in dataclasses.fields(TrainingArguments)} | set(Recipe.model_fields)
    said = fields - FREE - REFUSED.keys() - WITHOUT_EFFECT.keys() - {"training"}
    values = {key: settings[key] for key in sorted(said & settings.keys())}
    return json.loads(json.dumps(values | {"processes": arguments.world_size}, default=str))


def check_changes(checkpoint: Path, facts: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """The changes since a checkpoint that are said. Raises ValueError for one of a run with other facts."""
    saved = read_run(checkpoint)
    before = saved.get("facts", {})
    if is_sharded(checkpoint):
        before = before | {"sharding": facts.get("sharding")}
    refused = [text for fact in sorted(before.keys() | facts.keys()) for text in _refused(fact, before, facts)]
    if refused:
        more = f"; and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        raise ValueError(
            f"{checkpoint} is of another run: {'; '.join(refused[:_SHOWN])}{more}. Accepted: the same, or "
            f"model={checkpoint} in another output_dir to start from its weights"
        )
    earlier = saved.get("settings", {})
    return [
        f"{key} was {earlier[key]!r} and is {value!r}"
        for key, value in settings.items()
        if key in earlier and earlier[key] != value
    ]


def _refused(fact: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    was, value = before.get(fact), now.get(fact)
    if was == value or (was is None and fact in _MAY_BEGIN):
        return
    if fact == "data" and was and value:
        yield from _other_data(was, value)
    else:
        yield from _differences(fact, was, value)


def _other_data(was: list[dict[str, Any]], now: list[dict[str, Any]]) -> Iterator[str]:
    """At most one difference of sources: names do not count, what they hold and their order do."""

    def rows(sources: list[dict[str, Any]]) -> list[tuple[str, float]]:
        return [(source["fingerprint"], source["share"]) for source in sources]

    def shown(sources: list[dict[str, Any]]) -> str:
        return ", ".join(f"{source['source']} ({source['share']:.4g})" for source in sources)

    if rows(was) == rows(now):
        return
    reason = "other documents, or another split of them"
    if sorted(rows(was)) == sorted(rows(now)):
        reason = "another order of sources reads other rows"
    elif [fingerprint for fingerprint, _ in rows(was)] == [fingerprint for fingerprint, _ in rows(now)]:
        reason = "other shares"
    yield f"data was {shown(was)} and is {shown(now)}: {reason}"


def _differences(path: str, was: Any, now: Any) -> Iterator[str]:
    """The parts in which two JSON values differ."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was.keys() | now.keys()):
            if was.get(key) != now.get(key):
                yield from _differences(f"{path}.{key}", was.get(key), now.get(key))
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for index, (one, other) in enumerate(zip(was, now, strict=True)):
            if one != other:
                yield from _differences(f"{path}[{index}]", one, other)
    else:
        yield f"{path} was {_short(was)} and is {_short(now)}"


def _short(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return f"{len(value)} entries"
    return repr(value)
