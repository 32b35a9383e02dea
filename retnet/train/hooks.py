"""Callbacks of the Trainer's loop: restoring progress, checking losses, and stopping at the right step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from retnet.train.losses import CHECK_EVERY

if TYPE_CHECKING:
    from retnet.train.trainer import PackedTrainer


class TrainingHooks(TrainerCallback):
    """The events that `PackedTrainer` acts on."""

    def __init__(self, trainer: PackedTrainer):
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.restore_progress()
        self._trainer.validate_if_due()
        self._trainer.meter.restart()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.batches.epoch = state.global_step // self._trainer.steps_per_epoch

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self._trainer
        if args.device.type == "cpu" or state.global_step % CHECK_EVERY == 0:
            trainer.check_losses()
        trainer.check_savable()
        trainer.finish_saving(if_done=True)
        if state.global_step == state.max_steps:  # processes agree before each step, and no step follows
            trainer.terminated = trainer.consensus.any(trainer.signal.received)
        if trainer.terminated:
            trainer.validation_due = control.should_evaluate or epoch_validation_follows(trainer)
            control.should_training_stop = control.should_save = control.should_log = True
            control.should_evaluate = False
        elif trainer.clock.fraction >= 1:
            control.should_training_stop = control.should_log = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer.terminated:
            self._trainer.raise_terminated()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.stop_reading_ahead()
        self._trainer.finish_saving()


def epoch_validation_follows(trainer: PackedTrainer) -> bool:
    """Whether an epoch ends with this step, and a validation is due at its end."""
    args, state = trainer.args, trainer.state
    ends_epoch = state.global_step % trainer.steps_per_epoch == 0 or state.global_step == state.max_steps
    return ends_epoch and args.eval_strategy == "epoch" and args.eval_delay <= (state.epoch or 0)
