"""State tuning: the initial state of every document is trained, and all weights of the model stay as they are.

Every document of a packed row starts from the learned state, with a gradient into it. Its parameters alone are in
checkpoints, as `model.safetensors`. A finished run saves them as a snapshot (`retnet.models.snapshot`), from which
`retnet generate` and `retnet serve` start requests. The language model computes as it does when it serves: without
dropout, with all experts, in the dtype that it was saved in.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_NAME

from retnet.models.fingerprint import fingerprint
from retnet.models.initial_state import LearnedState
from retnet.models.lm import LanguageModel
from retnet.models.snapshot import Snapshot
from retnet.models.states import ModelState
from retnet.train.checkpoints import publish, staged
from retnet.train.packed_model import PackedForCausalLM
from retnet.train.trainer import PackedTrainer

STATE_FILE = "state.safetensors"


class StateTunedForCausalLM(PackedForCausalLM):
    """A frozen model and the initial state that is trained.

    base: the fingerprint of the model as it was loaded.
    """

    trains_weights: ClassVar[bool] = False
    initial: LearnedState
    base: str

    @classmethod
    def trainable(cls, model: LanguageModel) -> Self:
        """The model, frozen. Raises ValueError for one whose layers have no state to learn."""
        initial, base = LearnedState(model), fingerprint(model)
        packed = cls.wrap(model.requires_grad_(False))
        packed.initial, packed.base = initial, base
        return packed.train()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for part in self.model.children():
            part.eval()
        return self

    def states_before(
        self, lanes: ModelState | None, begins_fresh: Tensor, bounds: Tensor, starts: Tensor
    ) -> ModelState:
        assert lanes is None  # `state_recipe.py` refuses carry_state
        return self.initial(self.model, len(bounds) - 1)

    @property
    def unsaved_names(self) -> set[str]:
        return {name for name in self.state_dict() if not name.startswith("initial.")}

    def save_pretrained(  # pyright: ignore
        self, save_directory: str | os.PathLike[str], state_dict: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Write the parameters of the initial state."""
        tensors = {f"initial.{name}": x.detach().contiguous() for name, x in self.initial.state_dict().items()}
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        save_file(tensors, Path(save_directory) / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})


def save_state(trainer: PackedTrainer, output: Path, document_start: int) -> Snapshot | None:
    """Write the learned state into the run's directory; returned in the process that writes. All processes call this.

    document_start: the token that the first token of every document is.
    """
    packed = cast(StateTunedForCausalLM, trainer.model)
    snapshot = None
    with staged(output, "state", writes=trainer.args.should_save) as staging:
        if trainer.args.should_save:
            staging.mkdir()
            snapshot = packed.initial.snapshot(packed.model, document_start, packed.base)
            snapshot.save(staging / STATE_FILE)
            publish(staging, output)
    trainer.accelerator.wait_for_everyone()
    return snapshot


def describe_state(console: Console, packed: StateTunedForCausalLM) -> None:
    """Say what is trained, and which layers have nothing to train."""
    config, trained = packed.model.config, packed.initial.trained_layers
    count = sum(x.numel() for x in packed.initial.parameters())
    text = f"trained: {count:,} values of the initial state of {len(trained)} of {len(config.layers)} layers"
    for kind, layers in packed.initial.left_out.items():
        numbers = ", ".join(map(str, layers))
        text += f"; {kind} has no such state (layer{'' if len(layers) == 1 else 's'} {numbers})"
    console.print(text, highlight=False, soft_wrap=True)
