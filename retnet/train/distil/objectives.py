"""Losses of the two stages, as models that the trainer trains in place of `PackedForCausalLM`.

    layers    each student mixer gives what the teacher's mixer gives, for the teacher's hidden states: the mean over
              layers of the relative squared error. All layers learn at once, from one pass of the teacher.
    logits    KL(teacher || student) of the next token, plus a share of cross-entropy

In evaluation both give the cross-entropy of the student, so that validations of all stages are comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from retnet.layers.block import Block
from retnet.layers.token_layout import TokenLayout
from retnet.models.hf.model import CausalOutput
from retnet.models.lm import LanguageModel
from retnet.train.distil.fit import layer_error, watched_mixers
from retnet.train.distil.soft_loss import SoftTargets, linear_divergence
from retnet.train.packed_model import PackedForCausalLM, target_share


@dataclass
class Frozen:
    """The teacher, which is no part of the model that is trained and saved. It moves to the device of its first ids."""

    model: LanguageModel

    @torch.no_grad()
    def hidden(self, ids: Tensor, bounds: Tensor) -> Tensor:
        """Final hidden states [1, T, D] of packed documents."""
        self.model.to(ids.device)
        return self.model.hidden(ids, cu_seqlens=bounds)[0]


class DistilledForCausalLM(PackedForCausalLM):
    """A student in training. loss_name: of what `training_loss` returns, per token."""

    loss_name = "KL"
    teacher: Frozen

    def training_loss(self, ids: Tensor, targets: Tensor, bounds: Tensor) -> Tensor:
        """The loss of documents [1, T] laid end to end, a mean over the targets [T]."""
        raise NotImplementedError

    def _packed(
        self, begins_fresh: Tensor, lanes: Any, carry: bool, *, num_items_in_batch: Any, **batch: Any
    ) -> CausalOutput:
        if not self.training:
            return super()._packed(begins_fresh, lanes, carry, num_items_in_batch=num_items_in_batch, **batch)
        targets, bounds = batch["shift_labels"].flatten(), batch["cu_seq_lens_q"]
        loss = self.training_loss(batch["input_ids"].reshape(1, -1), targets, bounds)
        return CausalOutput(loss=loss * target_share(targets, num_items_in_batch, loss.dtype))  # type: ignore[arg-type]


class AlignedForCausalLM(DistilledForCausalLM):
    """The stage `layers`. aligned: the layers whose mixers are trained; nothing else is."""

    loss_name = "layer error"
    aligned: Sequence[int]

    @classmethod
    def of(cls, student: LanguageModel, teacher: LanguageModel, aligned: Sequence[int]) -> AlignedForCausalLM:
        model = cls.trainable(student)
        model.teacher, model.aligned = Frozen(teacher), tuple(aligned)
        model.requires_grad_(False)
        for i in aligned:
            cast(Block, model.model.layers[i]).mixer.requires_grad_(True)
        return model

    def training_loss(self, ids: Tensor, targets: Tensor, bounds: Tensor) -> Tensor:
        with watched_mixers(self.teacher.model, self.aligned) as seen:
            self.teacher.hidden(ids, bounds)
        layout = TokenLayout.of((1, ids.shape[1]), ids.device, cu_seqlens=bounds)
        errors = []
        for i in self.aligned:
            given, wanted = seen.pop(i)
            errors.append(layer_error(self._mixed(i, given, layout), wanted))
        return torch.stack(errors).mean()

    def _mixed(self, i: int, x: Tensor, layout: TokenLayout) -> Tensor:
        mixer = cast(Block, self.model.layers[i]).mixer
        if self.model.recompute.level == "none":
            return mixer(x, None, layout)[0]
        return self.model.checkpoint(mixer, x, None, layout)[0]


class LogitsForCausalLM(DistilledForCausalLM):
    """The stage `logits`. cross_entropy: its weight beside the divergence's, which is 1 less."""

    cross_entropy: float = 0.0

    @classmethod
    def of(cls, student: LanguageModel, teacher: LanguageModel, cross_entropy: float) -> LogitsForCausalLM:
        model = cls.trainable(student)
        model.teacher, model.cross_entropy = Frozen(teacher), cross_entropy
        return model

    def training_loss(self, ids: Tensor, targets: Tensor, bounds: Tensor) -> Tensor:
        taught = self.teacher.model
        soft = SoftTargets(self.teacher.hidden(ids, bounds)[0], taught.head.weight, taught.config.logit_soft_cap)
        hidden, _ = self.model.hidden(ids, cu_seqlens=bounds)
        return linear_divergence(
            hidden[0], self.model.head.weight, targets, self.model.config.logit_soft_cap, soft,
            of_divergence=1 - self.cross_entropy, of_labels=self.cross_entropy,
        )  # fmt: skip
