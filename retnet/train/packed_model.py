"""The language model for training: the loss of packed rows, with states carried from row to row on request.

It differs from its base class, the Hugging Face model, in three ways. It never computes the logits of all tokens at
once. The auxiliary losses of routers count by the batch's share of the step's tokens. It can carry states (truncated
backpropagation through time): row b of a batch then continues row b of the batch before (a lane, see `retnet.data`).
The first document of a row starts from the lane's state, without a gradient into it; the other documents start from an
empty state. The rows are laid end to end, so the core model gets one state per document.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from retnet.data import IGNORED
from retnet.models.directory import PREFIX, in_dtypes
from retnet.models.hf import RetNetForCausalLM, StateCache
from retnet.models.hf.model import CausalOutput
from retnet.models.lm import Ahead, LanguageModel
from retnet.models.states import ModelState
from retnet.ops.context_shard import ContextShard


class PackedForCausalLM(RetNetForCausalLM):
    """A `RetNetForCausalLM` that trains on packed rows. It is saved as a `RetNetForCausalLM`.

    Its weights are float32 (or float64) while they are trained: most steps of an optimizer are smaller than the
    distance between two neighbouring numbers in half precision, and would leave such a weight as it is.

    final_dtypes: of the weights that a finished run saves, by their names in LanguageModel; None: as they are trained.
        Checkpoints hold the weights as they are trained.
    trains_weights: whether the weights of the language model are trained, with the losses of its routers.
    loss_name: of the training loss; "" for cross-entropy, which is also given in bits per byte.
    """

    loss_name = ""
    final_dtypes: Mapping[str, torch.dtype] | None = None
    trains_weights: ClassVar[bool] = True
    _saves_final = False

    @classmethod
    def trainable(cls, model: LanguageModel) -> Self:
        """The model, whose weights in half precision become float32, without changing a value."""
        dtypes = {name: x.dtype for name, x in model.state_dict().items() if x.is_floating_point()}
        has_half = any(dtype.itemsize < torch.float32.itemsize for dtype in dtypes.values())
        if has_half:
            model.float()
        packed = cls.wrap(model)
        packed.final_dtypes = dtypes if has_half else None
        return packed

    @contextmanager
    def saving_final(self) -> Iterator[None]:
        """A context in which `save_pretrained` saves the weights in `final_dtypes`."""
        self._saves_final = True
        try:
            yield
        finally:
            self._saves_final = False

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        *args: Any,
        begins_fresh: Tensor | None = None,
        lanes: ModelState | None = None,
        carry: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """With begins_fresh, the loss of a batch from `collate`; without it, as the base class.

        begins_fresh [B]: whether the first document of a row begins there. lanes: the states [B] that other rows
        continue. carry: return the states after the rows, as `past_key_values`.
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
        num_items_in_batch: Tensor | int,
        cu_seq_lens_q: Tensor | None = None,
        context: ContextShard | None = None,
    ) -> CausalOutput:
        """The summed cross-entropy of the targets, divided by num_items_in_batch; in training, plus the losses of
        routers and of multi-token prediction.

        With context, all is of this shard of the rows, which knows the documents; then no states are carried.
        """
        trains_ahead = self.training and self.trains_weights and self.model.mtp is not None
        if context is not None:
            hidden, _ = self.model.hidden(input_ids, context=context)
            nats = self.model.mean_nats(hidden, shift_labels)
            further = (
                self.model.ahead(hidden, input_ids, labels=shift_labels, context=context) if trains_ahead else None
            )
            return _output(nats, None, further, target_share(shift_labels, num_items_in_batch, nats.dtype))
        assert cu_seq_lens_q is not None
        bounds, (B, T) = cu_seq_lens_q, input_ids.shape
        torch._dynamo.maybe_mark_dynamic(bounds, 0)  # one graph for any number of documents
        starts = torch.arange(0, B * T, T, device=bounds.device)
        before = self.states_before(lanes, begins_fresh, bounds, starts)
        losses: list[Tensor] | None = [] if self.trains_weights else None
        ids, targets = input_ids.reshape(1, -1), shift_labels.reshape(1, -1)
        hidden, after = self.model.hidden(ids, before, cu_seqlens=bounds, carry=carry, losses=losses)
        nats, further = self.model.mean_nats(hidden, targets), None
        if trains_ahead:
            further = self.model.ahead(
                hidden, ids, before, labels=targets, cu_seqlens=bounds, carry=carry, losses=losses
            )
        output = _output(
            nats, losses if self.training else None, further, target_share(targets, num_items_in_batch, nats.dtype)
        )
        if after is not None:
            after = after if further is None else replace(after, mtp=further.states)
            cache = StateCache()
            last = torch.searchsorted(bounds, starts + T) - 1  # the end of a row is always a boundary
            cache.update_state(detached(after.select(last)), T)
            output.past_key_values = cache  # type: ignore[assignment]
        return output

    def states_before(
        self, lanes: ModelState | None, begins_fresh: Tensor, bounds: Tensor, starts: Tensor
    ) -> ModelState | None:
        """The state before each of the N documents of packed rows with these bounds [N + 1]; None: empty ones.

        lanes, begins_fresh: as in `forward`. starts [B]: where the rows begin.
        """
        return None if lanes is None else _states_before(lanes, begins_fresh, bounds, starts)

    @property
    def unsaved_names(self) -> set[str]:
        """Names of tensors that are not in checkpoints."""
        return self.tied_names

    @property
    def tied_names(self) -> set[str]:
        """Names of weights that are another's too, and are saved under that name only."""
        return {"model.head.weight"} if self.model.config.tie_embeddings else set()

    def save_pretrained(  # pyright: ignore
        self, save_directory: str | os.PathLike[str], state_dict: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        if state_dict is not None:
            # Gathered from shards, tied weights are two tensors, and transformers would save both.
            state_dict = {name: x for name, x in state_dict.items() if name not in self.tied_names}
        model = self.model
        if self._saves_final and self.final_dtypes is not None:
            named = None if state_dict is None else {n.removeprefix(PREFIX): x for n, x in state_dict.items()}
            model, state_dict = in_dtypes(model, self.final_dtypes, named), None
        RetNetForCausalLM.wrap(model).save_pretrained(save_directory, state_dict=state_dict, **kwargs)


def _output(nats: Tensor, router_losses: list[Tensor] | None, ahead: Ahead | None, share: Tensor) -> CausalOutput:
    """All losses, which are means over the targets of a batch with this share in the step."""
    loss = nats * share
    routers = torch.stack(router_losses).sum() * share if router_losses else None
    further = None if ahead is None or ahead.loss is None else ahead.loss * share
    total = sum((x for x in (routers, further) if x is not None), loss)
    return CausalOutput(loss=total, aux_loss=routers, mtp_loss=further)  # type: ignore[arg-type]


def target_share(targets: Tensor, num_items: Tensor | int, dtype: torch.dtype) -> Tensor:
    """The share of these targets in all num_items targets of a step."""
    return (targets != IGNORED).sum().to(dtype) / num_items


def detached(state: ModelState) -> ModelState:
    """The state without its autograd history."""
    return ModelState.from_named({name: x.detach() for name, x in state.named_tensors().items()})


def _states_before(lanes: ModelState, begins_fresh: Tensor, bounds: Tensor, starts: Tensor) -> ModelState:
    """The state before each of the N documents of packed rows: a lane's, or an empty one."""
    count = len(starts)
    lane = torch.arange(count, device=bounds.device)
    with_fresh = lanes.select(torch.cat([lane, lane[:1]]))
    with_fresh.clear_(count)
    index = torch.full_like(bounds[:-1], count)
    index[torch.searchsorted(bounds, starts)] = torch.where(begins_fresh, count, lane)
    return with_fresh.select(index)
