"""The Trainer with sharded checkpoints: what `retnet train checkpoints=sharded` or `async` replaces of it.

A sharded checkpoint has the Trainer's `trainer_state.json`, the model's `config.json`, and

    shards.json, shard-*.safetensors    weights and the optimizer's tensors (`sharded_state.py`)
    state.json                          options of the optimizer, schedule, scaler
    random-PROCESS.json                 random numbers of each process

Nothing of it is a pickle. Any number of processes resumes it, under DDP and FSDP2. What form a checkpoint has decides
how it is loaded, and the setting how it is saved, so a resumed run may change it. accelerate's own sharded checkpoints
have an index that is unpickled: they are neither written nor read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast, get_args

from torch import nn
from torch.distributed.fsdp import StateDictType
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from retnet.models.directory import write_model_config
from retnet.models.shards import Shards, is_sharded, open_shards
from retnet.system.files import read_json, write_json
from retnet.train.checkpoints import CheckpointError
from retnet.train.packed_model import PackedForCausalLM
from retnet.train.plain_state import from_plain, random_numbers, restore_random_numbers, to_plain
from retnet.train.recipe import CheckpointForm
from retnet.train.shard_saver import ShardSaver
from retnet.train.sharded_state import (
    load_optimizer,
    load_weights,
    optimizer_tensors,
    optimizer_values,
    own_share,
    weight_tensors,
)

FORMS: tuple[str, ...] = get_args(CheckpointForm)
WHOLE, SHARDED, ASYNC = FORMS
STATE = "state.json"


class ShardedTrainer(Trainer):
    """A Trainer whose checkpoints are sharded while `_staging` is set, if `saver` is."""

    saver: ShardSaver | None = None
    _staging: Path | None = None
    _is_savable = False

    def prepare_checkpoints(self, form: str | None) -> None:
        """Choose the form of the checkpoints, if None by `fsdp_config`. Raises ValueError for settings that differ."""
        form = _form(form, self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None)
        if form != WHOLE:
            if self.is_deepspeed_enabled or self.args.save_on_each_node:
                other = "deepspeed" if self.is_deepspeed_enabled else "save_on_each_node"
                raise ValueError(f"checkpoints is {form!r} with {other}; accepted: one of the two")
            self.saver = ShardSaver(form == ASYNC, self.args.ddp_timeout)

    def save_shards(self, folder: Path, finished: Callable[[dict[str, str]], None]) -> None:
        """Save the tensors, as `ShardSaver.save`, once all other files of this process are in the folder."""
        assert self.saver is not None
        tensors = weight_tensors(self._module, self._tied) | optimizer_tensors(self._module, self._plain_optimizer)
        self.saver.save(folder, own_share(tensors, self.args.process_index, self.args.world_size), finished)

    def check_savable(self) -> None:
        """Raise ValueError if the optimizer has a state that the form of checkpoints does not hold.

        Called after steps: an optimizer has a state from its first step on. Looks once.
        """
        if self.saver is not None and not self._is_savable:
            optimizer_tensors(self._module, self._plain_optimizer)
            optimizer_values(self._module, self._plain_optimizer)
            self._is_savable = True

    def close_saver(self) -> None:
        """Wait for a checkpoint that is being written, without showing its errors: the run has ended."""
        if self.saver is not None:
            self.saver.close()

    # Saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self._writes_shards:
            if self.args.should_save:
                write_model_config(str(output_dir), cast(PackedForCausalLM, self._module).model)
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._writes_shards:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            scaler = self.accelerator.scaler
            state = {
                "optimizer": optimizer_values(self._module, self._plain_optimizer),
                "schedule": to_plain(cast(Any, self.lr_scheduler).state_dict(), "the schedule"),
                "scaler": None if scaler is None else to_plain(scaler.state_dict(), "the scaler"),
            }
            write_json(Path(output_dir) / STATE, state)

    def _save_scaler(self, output_dir: str) -> None:
        if not self._writes_shards:
            super()._save_scaler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        if not self._writes_shards:
            super()._save_rng_state(output_dir)
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        write_json(_random_file(output_dir, self.args), random_numbers(self.args.device))

    # Loading

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not is_sharded(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with _readable(resume_from_checkpoint) as shards:
            load_weights(shards, self._module, self._tied)

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if is_sharded(best):
            self._load_from_checkpoint(str(best))
        else:
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with _readable(checkpoint) as shards:
            state, schedule = read_json(Path(checkpoint) / STATE), cast(Any, self.lr_scheduler)
            load_optimizer(shards, state.get("optimizer"), self._module, self._plain_optimizer)
            schedule.load_state_dict(from_plain(state.get("schedule"), schedule.state_dict(), "the schedule"))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(Path(checkpoint)):
            super()._load_scaler(checkpoint)
            return
        scaler = self.accelerator.scaler
        with _readable(checkpoint):
            saved = read_json(Path(checkpoint) / STATE).get("scaler")
            if scaler is not None and saved is not None:
                scaler.load_state_dict(from_plain(saved, scaler.state_dict(), "the scaler"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(Path(checkpoint)):
            super()._load_rng_state(checkpoint)
            return
        file = _random_file(checkpoint, self.args)
        if file.exists():  # otherwise the checkpoint is of fewer processes
            with _readable(checkpoint):
                restore_random_numbers(read_json(file), self.args.device)

    # What is saved

    @property
    def _writes_shards(self) -> bool:
        return self.saver is not None and self._staging is not None

    @property
    def _module(self) -> nn.Module:
        return cast(nn.Module, self.model)

    @property
    def _tied(self) -> set[str]:
        return cast(PackedForCausalLM, self.model).tied_names

    @property
    def _plain_optimizer(self) -> Optimizer:
        """The optimizer, out of accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)  # type: ignore[return-value]


def _form(form: str | None, plugin: Any) -> str:
    """The form of checkpoints. accelerate is left with its form for whole ones, which has no index to unpickle."""
    if plugin is None:
        return form or WHOLE
    asks_sharded = plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
    if asks_sharded and form == WHOLE:
        raise ValueError("checkpoints is 'whole' and fsdp_config has SHARDED_STATE_DICT; accepted: one of the two")
    form = form or (SHARDED if asks_sharded else WHOLE)
    if form != WHOLE:
        if plugin.fsdp_version != 2:
            raise ValueError(f"checkpoints is {form!r} with FSDP{plugin.fsdp_version}; accepted: FSDP2, or 'whole'")
        plugin.set_state_dict_type("FULL_STATE_DICT")
    return form


@contextmanager
def _readable(checkpoint: str) -> Iterator[Shards]:
    """The shards of a checkpoint; errors in reading them name it."""
    try:
        yield open_shards(Path(checkpoint))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} cannot be resumed: {error}") from error


def _random_file(checkpoint: str, args: TrainingArguments) -> Path:
    return Path(checkpoint) / f"random-{args.process_index}.json"
