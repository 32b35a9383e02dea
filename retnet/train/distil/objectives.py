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
from retnet.train.distil.fit import layer_error, mixer_of_layer, watched_mixers
from retnet.train.distil.soft_loss import SoftTargets, linear_divergence
from retnet.train.packed_model import PackedForCausalLM, target_share


def layers_loss(
    student: LanguageModel,
    teacher: LanguageModel,
    layers: Sequence[int],
    ids: Tensor,
    bounds: Tensor | None = None,
) -> Tensor:
    """The mean over layers of `layer_error`, for the hidden states of the teacher on ids [B, T].

    bounds [N + 1]: of documents laid end to end in one row.
    """
    with torch.no_grad(), watched_mixers(teacher, layers) as seen:
        teacher.hidden(ids, cu_seqlens=bounds)
    layout = TokenLayout.of((ids.shape[0], ids.shape[1]), ids.device, cu_seqlens=bounds)
    errors, dtype = [], student.embedding.weight.dtype  # the teacher's may be narrower
    for i in layers:
        given, wanted = seen.pop(i)
        given = given.to(dtype)
        mixer = mixer_of_layer(student, i)
        mixer.prepare(layout, given.dtype)
        again = student.recompute.level != "none" and student.training
        made = student.checkpoint(mixer, given, None, layout) if again else mixer(given, None, layout)
        errors.append(layer_error(made[0], wanted))
    return torch.stack(errors).mean()


def logits_loss(
    student: LanguageModel,
    teacher: LanguageModel,
    ids: Tensor,
    targets: Tensor,
    bounds: Tensor | None = None,
    *,
    cross_entropy: float = 0.0,
) -> Tensor:
    """KL(teacher || student) per target, and the cross-entropy of targets [B, T] with its weight, of ids [B, T]."""
    with torch.no_grad():
        taught, _ = teacher.hidden(ids, cu_seqlens=bounds)
    hidden, _ = student.hidden(ids, cu_seqlens=bounds)
    soft = SoftTargets(teacher.before_head(taught), teacher.head.weight, teacher.config.logit_soft_cap)
    return linear_divergence(
        student.before_head(hidden), student.head.weight, targets, student.config.logit_soft_cap, soft,
        of_divergence=1 - cross_entropy, of_labels=cross_entropy,
    )  # fmt: skip


@dataclass
class Frozen:
    """The teacher, which is no part of the model that is trained and saved."""

    model: LanguageModel

    def on(self, device: torch.device) -> LanguageModel:
        return self.model.to(device)


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
        return layers_loss(self.model, self.teacher.on(ids.device), self.aligned, ids, bounds)


class LogitsForCausalLM(DistilledForCausalLM):
    """The stage `logits`. cross_entropy: its weight beside the divergence's, which is 1 less."""

    cross_entropy: float = 0.0

    @classmethod
    def of(cls, student: LanguageModel, teacher: LanguageModel, cross_entropy: float) -> LogitsForCausalLM:
        model = cls.trainable(student)
        model.teacher, model.cross_entropy = Frozen(teacher), cross_entropy
        return model

    def training_loss(self, ids: Tensor, targets: Tensor, bounds: Tensor) -> Tensor:
        teacher = self.teacher.on(ids.device)
        return logits_loss(self.model, teacher, ids, targets[None], bounds, cross_entropy=self.cross_entropy)
