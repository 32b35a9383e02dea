"""The language model as the trainer calls it: packed rows in, their loss out, states from row to row if wanted.

Beside the Hugging Face face it is built on, it never makes the logits of all tokens (in validation either), weighs what
routers add to the loss by a batch's share of the step's tokens, and can carry states: truncated backpropagation through
time. The rows of a batch are then lanes (`retnet.data`): row b goes on where row b of the batch before ended. Its first
document starts from the state that the lane ended with, without a gradient into it, and every other one afresh. Rows
are packed end to end, so the core gets one state a document: the lanes', or that of a lane that has seen nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from retnet.data import IGNORED
from retnet.models.hf import RetNetForCausalLM, StateCache
from retnet.models.loss import linear_cross_entropy
from retnet.models.states import ModelState


class PackedForCausalLM(RetNetForCausalLM):
    """`RetNetForCausalLM` that trains on packed rows. Saved, it is a `RetNetForCausalLM`."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        *args: Any,
        begins_fresh: Tensor | None = None,
        lanes: ModelState | None = None,
        carry: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """As the base class without begins_fresh; with it, the loss of a batch that `collate` made.

        begins_fresh [B]: whether a row's first document begins here. lanes: the states [B] that the others go on from.
        carry: return the states after the rows, as `past_key_values`.
        """
        if begins_fresh is None:
            return super().forward(*args, **kwargs)
        return self._packed(begins_fresh, lanes, carry, **kwargs)

    def _packed(
        self,
        begins_fresh: Tensor,
        lanes: ModelState | None,
        carry: bool,
        *,
        input_ids: Tensor,
        labels: Tensor,
        shift_labels: Tensor,
        cu_seq_lens_q: Tensor,
        num_items_in_batch: Tensor | int,
    ) -> CausalLMOutputWithPast:
        """The sum of the targets' nats over num_items_in_batch."""
        bounds, (B, T) = cu_seq_lens_q, input_ids.shape
        torch._dynamo.maybe_mark_dynamic(bounds, 0)  # as many as there are documents: no graph of its own for each
        starts = torch.arange(0, B * T, T, device=bounds.device)
        before = None if lanes is None else _states_before(lanes, begins_fresh, bounds, starts)
        losses: list[Tensor] = []
        hidden, after = self.model.hidden(
            input_ids.reshape(1, -1), before, cu_seqlens=bounds, carry=carry, losses=losses
        )
        targets = shift_labels.flatten()
        share = (targets != IGNORED).sum() / num_items_in_batch
        loss = self._mean_nats(hidden[0], targets) * share
        if self.training:
            loss = sum((extra * share for extra in losses), loss)
        cache = None
        if after is not None:
            cache = StateCache()
            last = torch.searchsorted(bounds, starts + T) - 1  # a row's end is always a bound
            cache.update_state(detached(after.select(last)), T)
        return CausalLMOutputWithPast(loss=loss, past_key_values=cache)  # type: ignore[arg-type]

    def _mean_nats(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of targets [R] given hidden states [R, D]; 0 without any."""
        if self._head_is_plain:
            return linear_cross_entropy(hidden, self.model.head.weight, targets, self.model.config.logit_soft_cap)
        nats = F.cross_entropy(self.model.logits(hidden).float(), targets, ignore_index=IGNORED, reduction="sum")
        return nats / (targets != IGNORED).sum().clamp_min(1)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:  # pyright: ignore
        RetNetForCausalLM.wrap(self.model).save_pretrained(save_directory, **kwargs)


def detached(state: ModelState) -> ModelState:
    """The same values, without what led to them."""
    return ModelState.from_named({name: x.detach() for name, x in state.named_tensors().items()})


def lanes_file(checkpoint: Path, process: int) -> Path:
    """Where a process keeps its lanes in a checkpoint."""
    return checkpoint / f"lanes-{process}.safetensors"


def _states_before(lanes: ModelState, begins_fresh: Tensor, bounds: Tensor, starts: Tensor) -> ModelState:
    """The state before each of the N documents of packed rows: a lane's, or one that has seen nothing."""
    count = len(starts)
    lane = torch.arange(count, device=bounds.device)
    with_fresh = lanes.select(torch.cat([lane, lane[:1]]))
    with_fresh.clear_(count)
    index = torch.full_like(bounds[:-1], count)
    index[torch.searchsorted(bounds, starts)] = torch.where(begins_fresh, count, lane)
    return with_fresh.select(index)
