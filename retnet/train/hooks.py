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
        self._trainer.meter.restart()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        batches = self._trainer.batches
        batches.epoch = state.global_step // (len(batches) // args.gradient_accumulation_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self._trainer
        if args.device.type == "cpu" or state.global_step % CHECK_EVERY == 0:
            trainer.check_losses()
        if state.global_step == state.max_steps:  # processes agree before each step, and no step follows
            trainer.terminated = trainer.consensus.any(trainer.signal.received)
        if trainer.terminated:
            control.should_training_stop = control.should_save = control.should_log = True
            control.should_evaluate = False
        elif trainer.clock.fraction >= 1:
            control.should_training_stop = control.should_log = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer.terminated:
            control.should_evaluate = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.stop_reading_ahead()
