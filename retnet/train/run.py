"""A training run, from a recipe to a saved model.

`train` opens the data and the model, chooses the checkpoint to resume from, trains (`trainer.py`), validates and saves.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.markup import escape
from transformers import TrainingArguments

from retnet.data.chat_corpus import ChatCorpus
from retnet.models.directory import CONFIG_FILE
from retnet.models.lm import LanguageModel
from retnet.models.mup import RULES, width_ratio
from retnet.ops.device import num_threads
from retnet.system.lock import locked
from retnet.system.lost_process import lost_process_named
from retnet.system.outputs import check_new_file
from retnet.system.progress import Progress
from retnet.train.card import write_card
from retnet.train.changes import check_changes, run_facts, said_settings
from retnet.train.checkpoints import CheckpointError, choose, inspect, list_checkpoints
from retnet.train.cpu_fsdp import sharding_on_cpus
from retnet.train.finish import TrainingSummary, continuations, record, save_whole_model
from retnet.train.inputs import RunData, Wrap, initial_model, open_data
from retnet.train.muon_recipe import MUON
from retnet.train.packed_model import PackedForCausalLM
from retnet.train.parameter_patterns import without_a_match
from retnet.train.progress import ProgressCallback
from retnet.train.recipe import Recipe
from retnet.train.report import REPORT_FILE, Report, Subject, all_settings, run_tables
from retnet.train.row_shards import check_row_shards, check_shared_layers
from retnet.train.saved_tokenizer import tokenizer_to_save
from retnet.train.state_effect import EFFECT_FILE, effect_of_run
from retnet.train.state_tuning import STATE_FILE, StateTunedForCausalLM, describe_state, save_state
from retnet.train.trainer import PackedTrainer, RunOptions

PADDING = 1024  # tokens by which a vocabulary is commonly rounded up, for speed
NEWEST = ("auto", "true")  # values of resume_from_checkpoint that select the newest checkpoint


@dataclass(frozen=True)
class Objective:
    """What a run minimises. wrap: of the initial model, the model for training. facts: what a checkpoint of the run
    must share with it to be resumed, as plain JSON values.
    """

    wrap: Wrap = PackedForCausalLM.trainable
    facts: Mapping[str, Any] = field(default_factory=dict)


def train(recipe: Recipe, console: Console, objective: Objective | None = None) -> TrainingSummary:
    """Run a recipe. Afterwards the output directory holds the model, its tokenizer, and the files of `finish.py`.

    objective: cross-entropy if None.

    Raises ValueError or OSError for a model or data that cannot be used, NonFiniteLoss (a ValueError) if the loss is
    not finite, CheckpointError (an OSError) if a checkpoint cannot be written or read, Terminated after a SIGTERM or
    Ctrl-C, once a checkpoint has been saved, Locked (an OSError) while another run writes to the directory, and
    LostProcess (an OSError) if another process of the run has ended.
    """
    arguments = recipe.training_arguments()
    if arguments.n_gpu > 1:
        raise ValueError(
            f"{arguments.n_gpu} GPUs in one process would split packed rows: start one process per GPU with torchrun, "
            "or choose one GPU with CUDA_VISIBLE_DEVICES"
        )
    check_row_shards(recipe, arguments)
    if arguments.process_index > 0:  # only the first process prints
        console = Console(quiet=True)
    output = Path(str(arguments.output_dir))
    with Progress(console, "opening the data") as shown:
        data = open_data(recipe, arguments)
        shown.begin("building the model")
        objective = objective or Objective()
        model = initial_model(recipe, data.corpus, arguments.seed, data.chat_template, objective.wrap)
    check_shared_layers(recipe, model.model.config)
    lock = locked(output) if arguments.should_save else nullcontext()
    with lost_process_named(arguments.process_index), lock:
        return _train(recipe, arguments, data, model, objective.facts, console)


def _train(
    recipe: Recipe,
    arguments: TrainingArguments,
    data: RunData,
    model: PackedForCausalLM,
    facts: Mapping[str, Any],
    console: Console,
) -> TrainingSummary:
    options = RunOptions(
        context_parallel=recipe.context_parallel,
        carry_state=recipe.carry_state,
        router_lr_multiplier=recipe.router_lr_multiplier,
        optimizer_groups=recipe.optimizer_groups,
        max_minutes=recipe.max_minutes,
        checkpoints=recipe.checkpoints,
        facts=run_facts(recipe, arguments, data, model) | dict(facts),
        settings=said_settings(recipe, arguments),
    )
    resumed = _checkpoint(recipe, arguments, options, console)
    with sharding_on_cpus(arguments):
        try:
            trainer = PackedTrainer(model, arguments, data.train, data.valid, options)
        except Exception as error:
            # For push_to_hub it creates a repository, where the hub's client raises many kinds.
            if not (arguments.push_to_hub or isinstance(error, ImportError | KeyError | TypeError | RuntimeError)):
                raise
            raise ValueError(f"the Trainer does not accept these settings: {error}") from error
    trainer.resumed = resumed
    trainer.shards.check_same_data([corpus.fingerprint for corpus in data.corpora.values()], arguments.device)
    progress = ProgressCallback(console, trainer.clock)
    trainer.add_callback(progress)
    report = _report(recipe, arguments, data, trainer, console)
    parameters = sum(p.numel() for p in model.parameters())
    _describe(console, recipe, cast(LanguageModel, model.model), parameters, data, trainer)
    try:
        with trainer.signal:
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
            summary, samples = _finish(trainer, recipe, data, parameters, console)
    except BaseException as error:
        progress.close()
        if report is not None:
            report.stop(error)
        raise
    finally:
        trainer.close_saver()
    if report is not None:
        report.finish(samples)
    return summary


def _report(
    recipe: Recipe, arguments: TrainingArguments, data: RunData, trainer: PackedTrainer, console: Console
) -> Report | None:
    """The report of a run, which only its first process has."""
    if not trainer.is_world_process_zero():
        return None
    config = cast(PackedForCausalLM, trainer.model).model.config
    rows_per_step = trainer.options.facts["rows_per_step"]
    subject = Subject(
        title=f"Training of {recipe.model}",
        tokens_per_step=rows_per_step * recipe.length,
        tables=run_tables(recipe, arguments, data, config, rows_per_step),
        settings=all_settings(recipe, arguments),
    )
    path = Path(str(arguments.output_dir)) / REPORT_FILE

    def warn(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    warn(f"report: {path}")
    report = Report(path, subject, trainer.clock, warn)
    trainer.add_callback(report)
    return report


def _finish(
    trainer: PackedTrainer, recipe: Recipe, data: RunData, parameters: int, console: Console
) -> tuple[TrainingSummary, list[tuple[str, str]]]:
    """Save the trained model, validate it, sample from it, and write the log. Returns the summary and the samples.

    The model is saved first: a signal during validation ends the run, and one after it only the samples.
    """
    arguments: TrainingArguments = trainer.args
    output, seconds = Path(str(arguments.output_dir)), trainer.clock.read()
    trainer.check_weights()
    packed = cast(PackedForCausalLM, trainer.model)
    directory, state = output, None
    if isinstance(packed, StateTunedForCausalLM):
        directory, snapshot = packed.model.directory or output, save_state(trainer, output, data.corpus.document_start)
        state = None if snapshot is None else snapshot.state
    else:
        save_whole_model(trainer, output, tokenizer_to_save(data.corpus, packed.model.directory, data.chat_template))
    trainer.model_saved = True
    metrics = trainer.evaluate() if arguments.do_eval else {}
    tokens = trainer.state.global_step * trainer.options.facts["rows_per_step"] * recipe.length
    summary = _summary(trainer, data, metrics, tokens=tokens, seconds=seconds, parameters=parameters)
    samples = []
    if trainer.is_world_process_zero():
        documents = next(iter(data.valid.values())).corpus
        stop = trainer.signal
        samples = continuations(directory, documents, recipe.num_samples, arguments.seed, arguments.device, stop, state)
        if stop.received:
            console.print(f"stopped by a signal after training, with {len(samples)} of {recipe.num_samples} samples")
        record(output, recipe, arguments, summary, trainer.state.log_history, samples, console)
        if isinstance(packed, StateTunedForCausalLM):
            effect = effect_of_run(packed, data)
            effect.save(output / EFFECT_FILE)
            effect.show(console)
        else:
            tables = run_tables(recipe, arguments, data, packed.model.config, trainer.options.facts["rows_per_step"])
            write_card(output, packed.model.config, summary, tables, arguments.hub_model_id)
    if arguments.push_to_hub:
        trainer.push_whole_model()
    return summary, samples


def _summary(
    trainer: PackedTrainer, data: RunData, metrics: dict[str, float], *, tokens: int, seconds: float, parameters: int
) -> TrainingSummary:
    return TrainingSummary(
        steps=trainer.state.global_step,
        tokens=tokens,
        seconds=seconds,
        train_bytes=data.train.num_bytes,
        valid_bytes=sum(rows.num_bytes for rows in data.valid.values()),
        valid_loss=metrics.get("eval_loss"),
        valid_perplexity=metrics.get("eval_perplexity"),
        valid_bits_per_byte=metrics.get("eval_bits_per_byte"),
        parameters=parameters,
        data_wait=trainer.meter.total_waited / max(trainer.meter.total_seconds, 1e-9),
        mfu_peak=trainer.meter.peak.source,
    )


def _checkpoint(recipe: Recipe, arguments: TrainingArguments, options: RunOptions, console: Console) -> Path | None:
    """The checkpoint to resume from, chosen by the first process."""
    chosen: list[Any] = [None]
    if arguments.process_index == 0:
        chosen = [_choose_checkpoint(recipe, Path(str(arguments.output_dir)), console)]
    if arguments.world_size > 1:
        broadcast_object_list(chosen)
    path: Path | None = chosen[0]
    if path is not None:
        changes = check_changes(path, options.facts, options.settings)
        if changes:
            console.print(f"changed: {'; '.join(changes)}", markup=False, highlight=False, soft_wrap=True)
    return path


def _choose_checkpoint(recipe: Recipe, output: Path, console: Console) -> Path | None:
    asked = recipe.training.get("resume_from_checkpoint")
    if not asked or str(asked).lower() in ("false", "no"):
        existing = list_checkpoints(output)
        if existing:
            raise ValueError(
                f"{output} holds checkpoints of an earlier run, up to {existing[-1].path.name}; accepted: "
                "resume_from_checkpoint=auto to resume it, or another output_dir"
            )
        _check_no_model(output, recipe.force)
        return None
    if str(asked).lower() not in NEWEST:
        checkpoint = inspect(Path(str(asked)))
        if within := list_checkpoints(checkpoint.path):
            raise CheckpointError(
                f"{asked} is the output folder of a run; accepted: one of its checkpoints, such as {within[-1].path}, "
                "or resume_from_checkpoint=auto"
            )
        if checkpoint.problem is not None:
            raise CheckpointError(f"{asked} is not a complete checkpoint: {checkpoint.problem}")
        return checkpoint.path
    newest, damaged = choose(output)
    for checkpoint in damaged:
        console.print(
            f"[yellow]skipped {escape(f'{checkpoint.path}: {checkpoint.problem}')}[/]", highlight=False, soft_wrap=True
        )
    if newest is None:
        _check_no_model(output, recipe.force)
        console.print(f"no checkpoint in {output}: starting from the beginning", markup=False, highlight=False)
        return None
    console.print(f"resuming from {newest.path}", markup=False, highlight=False, soft_wrap=True)
    return newest.path


def _check_no_model(output: Path, force: bool) -> None:
    """Raise FileExistsError if the directory of a run that starts holds a model, which the run would replace."""
    for name in (CONFIG_FILE, STATE_FILE):
        check_new_file(output / name, force=force, accepted="another output_dir, or force=true to replace the model")


def _describe(
    console: Console, recipe: Recipe, model: LanguageModel, parameters: int, data: RunData, trainer: PackedTrainer
) -> None:
    arguments: TrainingArguments = trainer.args
    names = ", ".join(f"[bold]{escape(name)}[/]" for name in recipe.weights)
    documents = sum(len(corpus) for corpus in data.corpora.values())
    valid_bytes = sum(rows.num_bytes for rows in data.valid.values())
    console.print(
        f"[bold]{escape(str(recipe.model))}[/] {parameters / 1e6:.2f}M parameters; {names} "
        f"{data.train.num_bytes / 1e6:.2f} MB in {documents:,} documents, {len(data.train):,} rows of "
        f"{recipe.length:,}; validation {valid_bytes / 1e6:.2f} MB",
        soft_wrap=True,
    )
    packed = cast(PackedForCausalLM, trainer.model)
    _describe_precision(console, packed, arguments)
    if packed.trains_weights and (ratio := width_ratio(model.config)) != 1.0:
        console.print(
            f"muP: {ratio:g} times the base width {model.config.mup_base_width:,}; hidden matrices train at "
            f"{ratio ** getattr(RULES['hidden'], 'muon' if arguments.optim == MUON else 'adamw'):.3g} times the rate",
            highlight=False,
        )
    for pattern in without_a_match((name for name, _ in model.named_parameters()), recipe.optimizer_groups):
        console.print(f"optimizer_groups: {pattern!r} matches no parameter", markup=False, highlight=False)
    if isinstance(packed, StateTunedForCausalLM):
        describe_state(console, packed)
    for name, corpus in data.corpora.items():
        if isinstance(corpus, ChatCorpus):
            _describe_chats(console, name, corpus, recipe)
    size, used = model.config.vocab_size, data.corpus.vocab_size
    if size - used >= PADDING:
        console.print(
            f"{size - used:,} of the model's {size:,} tokens are not in the data's tokenizer", highlight=False
        )
    where = f"{arguments.world_size} x {arguments.device.type}" if arguments.world_size > 1 else arguments.device.type
    if recipe.context_parallel > 1:
        where += f" ({recipe.context_parallel} share a row)"
    console.print(
        f"on {where}, {num_threads()}, {trainer.options.facts['rows_per_step']} rows per step; "
        f"MFU is relative to {trainer.meter.peak.source}",
        highlight=False,
        soft_wrap=True,
    )


def _describe_precision(console: Console, model: PackedForCausalLM, arguments: TrainingArguments) -> None:
    """Say in which dtype weights are trained, computed with and saved, where these differ from what was given."""
    if model.final_dtypes is None:
        return
    given = " and ".join(sorted({str(d).removeprefix("torch.") for d in model.final_dtypes.values()}))
    computed = "bfloat16 (bf16)" if arguments.bf16 else "float16 (fp16)" if arguments.fp16 else "float32"
    console.print(
        f"weights of {given}: trained in float32, where small steps are not rounded away; products in {computed}; the "
        f"model is saved in {given} again, its checkpoints in float32",
        highlight=False,
        soft_wrap=True,
    )


def _describe_chats(console: Console, name: str, corpus: ChatCorpus, recipe: Recipe) -> None:
    share = corpus.num_targets / corpus.num_tokens
    parts = [f"{name}: conversations in the chat template {corpus.template.name}, loss on {share:.0%} of the tokens"]
    if corpus.cut_short:
        parts.append(f"{corpus.cut_short:,} longer than a row and cut after {recipe.length:,} tokens")
    if corpus.without_answer:
        parts.append(f"{corpus.without_answer:,} without an answer left out")
    console.print("; ".join(parts), markup=False, highlight=False, soft_wrap=True)
