"""The Hugging Face Trainer for packed rows, with exact resumption.

Optimizers, mixed precision, distribution, schedules and reporting are the Trainer's. This class replaces what would
make a resumed run differ from one that was never stopped (batches, checkpoints), and what would report a loss that is
not the mean over all tokens (losses, validation).
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from retnet.data import PackedDataset, Rows
from retnet.models.hf.routing import UpdateRoutingBiases
from retnet.models.states import ModelState
from retnet.train.batches import FACTS, BatchFacts, ReadAhead, RowStream, TrainBatches, ValidBatches, collate, to_device
from retnet.train.checkpoints import CheckpointError, list_checkpoints
from retnet.train.hooks import TrainingHooks, epoch_validation_follows
from retnet.train.loss_parts import LossParts
from retnet.train.losses import LossWatch, NonFiniteLoss, all_finite
from retnet.train.muon import Muon
from retnet.train.muon_recipe import muon_cls_and_kwargs
from retnet.train.optimizer import (
    check_schedule,
    complete_schedule,
    decayed_parameters,
    scale_by_width,
    separate_routers,
)
from retnet.train.packed_model import PackedForCausalLM
from retnet.train.parameter_patterns import Patterns
from retnet.train.resume import ProcessState, read_run, save_run
from retnet.train.row_shards import RowShards
from retnet.train.staged_trainer import StagedTrainer
from retnet.train.stopping import ProcessConsensus, RunClock, Terminated, TerminationSignal
from retnet.train.throughput import Meter, device_peak, memory_gib

STATE_FILE = "trainer_state.json"


@dataclass(frozen=True)
class RunOptions:
    """The settings of a run that are not in TrainingArguments.

    context_parallel: processes that share rows (`row_shards.py`).
    checkpoints: their form (`sharded_trainer.py`). optimizer_groups: patterns (`parameter_patterns.py`).
    facts, settings: what a checkpoint records of the run (`changes.py`).
    """

    context_parallel: int = 1
    checkpoints: str | None = None
    carry_state: bool = False
    router_lr_multiplier: float = 1.0
    optimizer_groups: Patterns | None = None
    max_minutes: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


class PackedTrainer(StagedTrainer):
    """Trains on rows of packed documents.

    train_rows: the stream of rows (`batches.py`). valid_rows: by name; together they are the validation set.
    """

    def __init__(
        self,
        model: PackedForCausalLM,
        args: TrainingArguments,
        train_rows: Rows,
        valid_rows: Mapping[str, PackedDataset],
        options: RunOptions,
        callbacks: list[TrainerCallback] | None = None,
    ):
        self.rows, self.valid_rows, self.options = RowStream(train_rows), valid_rows, options
        # The Trainer requires a validation set; `evaluate` uses `valid_rows`.
        valid = RowStream(next(iter(valid_rows.values())))
        super().__init__(
            model=model,
            args=args,
            train_dataset=self.rows,
            eval_dataset=valid,
            callbacks=callbacks,
            optimizer_cls_and_kwargs=muon_cls_and_kwargs(args, options.optimizer_groups),  # type: ignore[arg-type]
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(TrainingHooks(self))
        self.routing = UpdateRoutingBiases()
        self.add_callback(self.routing)
        self.consensus, self.signal = ProcessConsensus(), TerminationSignal(announces=args.process_index == 0)
        self.shards = RowShards.of(options.context_parallel, args)
        self.prepare_checkpoints(options.checkpoints)
        self.clock = RunClock(options.max_minutes)
        self.watch = LossWatch(self.rows.describe)
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype
        self.meter = Meter(
            model.model.config, device_peak(args.device, dtype), args.world_size, trains_weights=model.trains_weights
        )
        self.terminated = self.validation_due = self.model_saved = False
        self.lanes: ModelState | None = None
        self._loss_name = model.loss_name
        self._parts = LossParts(model, args.device)
        self.resumed: Path | None = None
        self._ahead: ReadAhead | None = None
        self._source: Iterator[Any] | None = None
        self._best_step: int | None = None  # the step of the weights, if the best ones were loaded at the end
        self._validations: dict[int, dict[str, float]] = {}  # by the step of the weights

    # Batches

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        self.batches = TrainBatches(
            len(self.rows),
            self._train_batch_size,
            args.gradient_accumulation_steps,
            self.shards.index,
            self.shards.groups,
        )
        return self._loader(self.rows, self.batches)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.batches) // self.args.gradient_accumulation_steps

    def _loader(self, rows: RowStream, batches: TrainBatches | ValidBatches) -> DataLoader:
        args = self.args
        return DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of a step, on the device, and the number that their summed losses are divided by.

        No batches if the resumed run had already finished: the Trainer takes a step before it checks for the end.
        """
        if self.state.global_step >= self.state.max_steps or self.clock.fraction >= 1:
            self.control.should_training_stop = True
            return [], 1
        if epoch_iterator is not self._source:
            self.stop_reading_ahead()
            self._source = epoch_iterator
            self._ahead = ReadAhead(to_device(self.shards.cut(batch), device) for batch in epoch_iterator)
        assert self._ahead is not None
        begin = time.perf_counter()
        batches = list(islice(self._ahead, num_batches))
        self.meter.waited(time.perf_counter() - begin)
        num_targets = sum(batch[FACTS].num_targets for batch in batches)
        agreed = self.consensus.reach(num_targets, self.signal.received, self.clock.read())
        self.clock.seconds, self.terminated = agreed.seconds, agreed.terminate
        return batches, max(1, agreed.num_targets if self.args.average_tokens_across_devices else num_targets)

    def stop_reading_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = self._source = None

    # Steps

    def compute_loss(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        facts: BatchFacts = inputs.pop(FACTS)
        inputs |= {"lanes": self.lanes, "carry": self.options.carry_state}
        loss, outputs = cast(tuple[Tensor, Any], super().compute_loss(model, inputs, True, num_items_in_batch))
        if self.options.carry_state:
            self.lanes = outputs.past_key_values.state
        self.meter.count(facts)
        self.watch.add(self.state.global_step + 1, facts.rows, loss.detach())
        scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1  # as the Trainer's
        self._parts.note(outputs, scale)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the Trainer's; returns the cross-entropy alone, which is logged. The losses of routers and of multi-token
        prediction are logged beside it."""
        return self._parts.split_off(super().training_step(*args, **kwargs))

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:  # pyright: ignore[reportIncompatibleMethodOverride]
        facts: BatchFacts = inputs[FACTS]
        return facts.num_tokens * self.meter.flops_per_token(facts.num_tokens, facts.seen)

    def check_losses(self) -> None:
        """Raise NonFiniteLoss if any process has a loss that is not finite. All processes call this together."""
        problem = self.watch.check()
        if self.consensus.any(problem is not None):
            problem = problem or f"another process has a loss that is not finite, at step {self.state.global_step}"
            raise NonFiniteLoss(f"{problem}. {self._advice()}", self.watch.documents)

    def check_weights(self) -> None:
        """Raise NonFiniteLoss if a loss or a weight is not finite. All processes call this together."""
        self.check_losses()
        assert self.model is not None
        if self.consensus.any(not all_finite(self.model)):
            step = self.state.global_step
            raise NonFiniteLoss(f"weights are not finite after step {step}. {self._advice()}", [])

    def _advice(self) -> str:
        complete = [c for c in list_checkpoints(Path(str(self.args.output_dir))) if c.problem is None]
        last, restart = "There is no checkpoint", ""
        if complete:
            last = f"The last good checkpoint is {complete[-1].path}"
            restart = f": start from its weights with model={complete[-1].path} and another output_dir"
        return (
            f"{last}; a lower learning_rate (now {self.args.learning_rate:g}) or max_grad_norm "
            f"(now {self.args.max_grad_norm:g}) usually helps{restart}"
        )

    # Optimizer and schedule

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with muP's rates and routers in groups of their own. Raises ValueError if it cannot
        be made."""
        is_new = self.optimizer is None
        try:
            optimizer = super().create_optimizer(*args, **kwargs)
        except (ImportError, TypeError, ValueError) as error:
            given = self.args.to_dict()["optim"]
            raise ValueError(
                f"optim is {given!r} with optim_args {self.args.optim_args!r}, which cannot be made: {error}"
            ) from error
        assert self.model is not None
        if is_new and not isinstance(optimizer, Muon):  # whose groups have the rates already
            scale_by_width(optimizer, self.model)
        if is_new and self.options.router_lr_multiplier != 1.0:
            separate_routers(optimizer, self.model, self.options.router_lr_multiplier)
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decayed_parameters(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        args, arguments = self.args, cast(dict[str, Any] | None, self.args.lr_scheduler_kwargs)
        given, warmup = args.to_dict()["lr_scheduler_type"], args.get_warmup_steps(num_training_steps)
        try:
            args.lr_scheduler_kwargs = complete_schedule(given, arguments, warmup, num_training_steps)
            scheduler = super().create_scheduler(num_training_steps, optimizer)
            check_schedule(scheduler, num_training_steps)
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"lr_scheduler_type is {given!r} with lr_scheduler_kwargs {arguments!r}, which cannot be made: {error}"
            ) from error
        finally:
            args.lr_scheduler_kwargs = arguments
        if self.options.max_minutes is not None:
            if not isinstance(scheduler, LambdaLR):
                raise ValueError(
                    f"lr_scheduler_type is {given} with max_minutes; accepted there: a schedule that is a function of "
                    "the step, such as linear or cosine"
                )
            scheduler.lr_lambdas = [self.clock.schedule(f, num_training_steps) for f in scheduler.lr_lambdas]
        return scheduler

    def _apply_schedule(self) -> None:
        """Set the rates of the next step by a schedule that changed; the optimizer restored those of the checkpoint."""
        scheduler = self.lr_scheduler
        if isinstance(scheduler, LambdaLR):
            rates = [b * f(scheduler.last_epoch) for b, f in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
            for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates

    # Validation and log

    def evaluate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, eval_dataset: Dataset | None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss over all validation documents, per corpus and in total. Every token is scored once.

        Weights that this run has validated are not validated again. Training continues as without it: no random number
        of training is used.
        """
        if (done := self._validations.get(self._weights_step)) is not None:
            self.control.should_evaluate = False
            return done
        begin = time.perf_counter()
        with _same_random_numbers(self.args.device):
            sums = {name: self._score(rows) for name, rows in self.valid_rows.items()}
        if self.terminated:
            self.validation_due = True
            if self._best_step is None:  # otherwise the weights are not those of the last step
                self._save_checkpoint(cast(nn.Module, self.model), None)
            self.raise_terminated()
        metrics: dict[str, float] = {}
        if len(sums) > 1:
            for name, rows in self.valid_rows.items():
                metrics |= _loss_metrics(f"{metric_key_prefix}_{name}", sums[name], rows.num_bytes)
        num_bytes = sum(rows.num_bytes for rows in self.valid_rows.values())
        metrics |= _loss_metrics(metric_key_prefix, torch.stack(list(sums.values())).sum(0), num_bytes)
        if not math.isfinite(metrics[f"{metric_key_prefix}_loss"]):
            step = self.state.global_step
            raise NonFiniteLoss(f"the validation loss is not finite after step {step}. {self._advice()}", [])
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - begin
        self.meter.pause(metrics[f"{metric_key_prefix}_runtime"])
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._validations[self._weights_step] = metrics
        return metrics

    @property
    def _weights_step(self) -> int:
        return self.state.global_step if self._best_step is None else self._best_step

    def validate_if_due(self) -> None:
        """Do the validation that a signal prevented when the checkpoint was saved, as if there had been none."""
        if not self.validation_due:
            return
        self.validation_due = False
        metrics = self._evaluate(None, None)
        if self._determine_best_metric(metrics, None):
            self.state.best_model_checkpoint = str(self.resumed)

    def _load_best_model(self) -> None:
        self.finish_saving()
        super()._load_best_model()
        self._best_step = self.state.best_global_step

    @torch.no_grad()
    def _score(self, rows: PackedDataset) -> Tensor:
        """(nats, targets) [2] of all rows, float64, summed over all processes."""
        args, model = self.args, self.model
        assert model is not None
        per_process = rows.lanes // args.world_size if rows.carry_state else args.eval_batch_size
        loader = self._loader(
            RowStream(rows), ValidBatches(len(rows), per_process, self.shards.index, self.shards.groups)
        )
        was_training, lanes = model.training, None
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=args.device)
        self.callback_handler.eval_dataloader = cast(Any, loader)
        ahead = ReadAhead(to_device(self.shards.cut(batch), args.device) for batch in loader)
        for batch in ahead:
            if self.consensus.any(self.signal.received):
                self.terminated = True
                break
            facts: BatchFacts = batch.pop(FACTS)
            output = model(**batch, lanes=lanes, carry=rows.carry_state, num_items_in_batch=1)
            lanes = output.past_key_values.state if rows.carry_state else None
            total[0] += output.loss.double()
            total[1] += facts.num_targets
            self.control = self.callback_handler.on_prediction_step(args, self.state, self.control)
        ahead.close()
        model.train(was_training)
        return cast(Tensor, self.accelerator.reduce(total, "sum")).cpu()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.check_losses()
            gather = cast(Callable[[Tensor], Tensor], self.accelerator.gather)
            logs |= self._parts.means(self.state.global_step, gather)
            peak = 0.0 if self.routing.peak is None else self.routing.peak.item()
            if peak:  # otherwise no load was counted, as of weights that are not trained
                logs["expert_peak"] = peak
            if not self._loss_name:
                logs["bits_per_byte"] = logs["loss"] / math.log(2) / self.rows.rows.bytes_per_target
            logs |= self.meter.read()
            logs["memory_gib"] = memory_gib(self.args.device)
        super().log(logs, start_time)

    # The model and its checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's, but a push, which names no folder, does not save the whole model again."""
        if output_dir is not None or not self.model_saved:
            super().save_model(output_dir, _internal_call)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `card.py` writes the card from what the run knows."""

    def push_whole_model(self) -> None:
        """Upload the run's directory to the hub, without checkpoints. All processes call this."""
        (Path(str(self.args.output_dir)) / "training_args.bin").unlink(missing_ok=True)  # a pickle, of a checkpoint
        self.push_to_hub(commit_message="End of training")

    def raise_terminated(self) -> NoReturn:
        """End a run that has received a signal, once a checkpoint is saved."""
        self.finish_saving()
        if self.is_in_train:
            self.callback_handler.on_train_end(self.args, self.state, self.control)
        output = self.args.output_dir
        saved = f"the model is saved in {output}, without its last validation; " if self.model_saved else ""
        how_to_resume = f"{saved}resume_from_checkpoint=auto resumes from {output}"
        raise Terminated(self.state.global_step, how_to_resume, self.signal.number or signal.SIGTERM)

    def _save_progress(self, folder: Path, output: Path) -> None:
        """Save the files of `resume.py`."""
        loss, logged = float(self._tr_loss), self._globalstep_last_logged
        progress = ProcessState(loss, logged, self.lanes, **self._parts.sums())
        progress.save(folder, self.args.process_index)
        if self.args.should_save:
            before_validation = epoch_validation_follows(self) and self.state.global_step not in self._validations
            due = self.validation_due or before_validation
            progress = {"seconds": self.clock.seconds, "validation_due": due}
            save_run(folder, {"facts": self.options.facts, "settings": self.options.settings, **progress})
            if self.state.best_global_step:  # the Trainer recorded the path of the staging folder
                self.state.best_model_checkpoint = str(output / f"checkpoint-{self.state.best_global_step}")
                self.state.save_to_json(str(folder / STATE_FILE))

    def restore_progress(self) -> None:
        """The inverse of `_save_progress`, once the Trainer has loaded its part."""
        if self.resumed is None:
            self.clock.start(0.0)
            return
        self._saved_step = self.state.global_step
        run = read_run(self.resumed)
        self.clock.start(run["seconds"])
        self.validation_due = run["validation_due"]
        self.state.compute_steps(self.args, self.state.max_steps)  # the Trainer restored those of the checkpoint
        if run["settings"] != self.options.settings:
            self._apply_schedule()
        progress = ProcessState.load(self.resumed, self.args.process_index)
        if progress is not None:
            self._tr_loss.fill_(progress.loss)
            self._parts.restore(vars(progress), progress.last_logged)
            self._globalstep_last_logged = progress.last_logged
            if self.options.carry_state and progress.lanes is not None:
                self.lanes = progress.lanes.to(self.args.device)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raise CheckpointError for weights of another model; the Trainer warns."""
        unsaved = cast(PackedForCausalLM, self.model).unsaved_names
        wrong = sorted((set(load_result.missing_keys) - unsaved) | set(load_result.unexpected_keys))
        if wrong:
            raise CheckpointError(f"the weights of {self.resumed} are not those of the model: {', '.join(wrong[:5])}")


def _same_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """A context after which random numbers continue as if none had been drawn in it."""
    is_cuda = device.type == "cuda"
    return torch.random.fork_rng([device] if is_cuda else [], device_type=device.type if is_cuda else "cuda")


def _loss_metrics(prefix: str, sums: Tensor, num_bytes: int) -> dict[str, float]:
    """sums: (nats, targets)."""
    nats, targets = sums.tolist()
    mean = nats / max(1.0, targets)
    return {
        f"{prefix}_loss": mean,
        f"{prefix}_perplexity": math.exp(min(mean, 700.0)),
        f"{prefix}_bits_per_byte": nats / math.log(2) / num_bytes,
    }
