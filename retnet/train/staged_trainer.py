"""The Trainer with atomic checkpoints: staged, completed by all processes, then renamed and pushed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from retnet.train.checkpoints import commit, rotate, staged, undone_on_error
from retnet.train.sharded_trainer import ShardedTrainer
from retnet.train.stopping import ProcessConsensus
from retnet.train.throughput import Meter, synchronize


class StagedTrainer(ShardedTrainer):
    """A Trainer that saves with `checkpoints.py`, and waits for saves in the background."""

    consensus: ProcessConsensus
    meter: Meter
    _saved_step = -1
    _unpushed: Path | None = None  # a checkpoint that is being saved, or was saved and not pushed yet

    def check_weights(self) -> None:
        """Raise an error if the weights should not be saved."""
        raise NotImplementedError

    def _save_progress(self, folder: Path, output: Path) -> None:
        """Save what the Trainer does not, in the staged checkpoint of an output folder."""
        raise NotImplementedError

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: `_save_checkpoint` pushes once the checkpoint has its name."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Stage the Trainer's checkpoint and our files beside it, then give the folder its name."""
        step, args = self.state.global_step, self.args
        if step == self._saved_step:
            return
        self.check_weights()
        synchronize(args.device)
        begin = time.perf_counter()
        self.finish_saving()
        output = Path(self._get_output_dir(trial))
        with staged(output, f"checkpoint-{step}", writes=args.should_save) as folder:
            self.accelerator.wait_for_everyone()
            self._staging = folder.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            self._save_progress(folder, output)
            best = self.state.best_model_checkpoint
            complete = partial(_complete, folder, args.save_total_limit, None if best is None else Path(best))
            if self.saver is not None:
                self.save_shards(folder, complete)
            else:
                self.accelerator.wait_for_everyone()
                if args.should_save:
                    complete({})
                self.accelerator.wait_for_everyone()
        self._saved_step, self._unpushed = step, output / folder.name
        if self.saver is None or not self.saver.pending:
            self._push_saved()
        self.meter.pause(time.perf_counter() - begin)

    def _push_saved(self) -> None:
        if self.args.push_to_hub and self._unpushed is not None:
            super()._push_from_checkpoint(str(self._unpushed))
        self._unpushed = None

    def finish_saving(self, *, if_done: bool = False) -> None:
        """Wait for the checkpoint that is saved in the background, if there is one. All processes call this together.

        if_done: only if no process is still writing. Raises CheckpointError if it could not be written.
        """
        if self.saver is None or not self.saver.pending or (if_done and self.consensus.any(not self.saver.done)):
            return
        assert self._unpushed is not None
        with undone_on_error(self._unpushed.parent, self._unpushed.name, writes=self.args.should_save):
            self.saver.collect()
        self._push_saved()


def _complete(folder: Path, keep: int | None, best: Path | None, hashes: Mapping[str, str]) -> None:
    """Give a staged checkpoint its name, and remove those that it replaces. hashes: of files that are on the disk."""
    commit(folder, hashes)
    rotate(folder.parent.parent, keep, best)
