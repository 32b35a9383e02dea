"""The pool: the states of all slots in one set of tensors that never move or grow, and the memory of a slot.

A slot is overwritten completely when a request enters it and cleared when the request leaves. Clearing matters, because
attention multiplies masked values by zero, and zero times a leftover NaN is NaN.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch

from retnet.layers.mixers import MIXERS
from retnet.layers.retention import RetentionState
from retnet.models.config import ModelConfig
from retnet.models.decode.fused import empty_deferred_writes
from retnet.models.decode.sampling import SamplingTable
from retnet.models.lm import LanguageModel
from retnet.models.states import ModelState
from retnet.serve.speculation import Speculation
from retnet.system.checks import is_integer, quoted
from retnet.system.memory import total_bytes
from retnet.system.sizes import format_bytes

GROWING_CONTEXT = 8192  # tokens, for models whose cache grows with the context


@dataclass(frozen=True)
class SlotCost:
    """Bytes per slot. state: with caches sized for max_tokens, and room for deferred writes or a draft. sampling: the
    tables of sampling options. index: where drafts are looked up, on the host."""

    state: int
    sampling: int
    index: int = 0

    @property
    def total(self) -> int:
        return self.state + self.sampling + self.index

    def __str__(self) -> str:
        index = f", {self.index:,} of the index for drafts" if self.index else ""
        return f"{self.total:,} bytes per slot ({self.state:,} of state, {self.sampling:,} of sampling tables{index})"


class SlotPool:
    """The slots of one engine, given by number or by a memory budget, for requests of up to max_tokens.

    deferred_writes: tokens that a retention state may lag behind; they are kept in `deferred` (0: none).
    speculation: its draft updates and its index of n-grams, which others keep, are counted here.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        num_slots: int | None = None,
        memory_bytes: int | None = None,
        max_tokens: int | None = None,
        deferred_writes: int = 0,
        speculation: Speculation | None = None,
    ):
        check_servable(model.config, max_tokens)
        if (num_slots is None) == (memory_bytes is None):
            raise ValueError(f"num_slots is {num_slots}, memory_bytes {memory_bytes}; accepted: one of the two")
        uses_mtp = speculation is not None and speculation.uses_mtp
        one = _empty_state(model, 1, max_tokens, uses_mtp, torch.device("meta"))  # for its size
        beside = sum(ring.nbytes for ring in empty_deferred_writes(model, one, deferred_writes) if ring is not None)
        index, width = 0, 1
        if speculation is not None:
            width = speculation.draft_tokens + 1
            beside += _draft_bytes(model, width, uses_mtp)
            index = speculation.index_bytes(max_tokens)
        self.cost = SlotCost(one.nbytes + beside, SamplingTable.bytes_per_slot(model.config.vocab_size, width), index)
        if memory_bytes is not None:
            affordable = memory_bytes // self.cost.total
            num_slots = min(1, affordable) if affordable < 4 else affordable // 4 * 4
            if num_slots < 1:
                raise ValueError(f"memory_bytes is {memory_bytes:,}; accepted: at least {self.cost}")
        assert num_slots is not None
        # On a CPU, a product rounds all slots alike only if their number fills the blocks of its kernels.
        if not is_integer(num_slots, 1) or (num_slots > 1 and num_slots % 4):
            raise ValueError(
                f"num_slots is {quoted(num_slots)}; accepted: 1 or a multiple of 4, where all slots round alike"
            )
        _check_fits(num_slots * self.cost.total, num_slots, max_tokens, model.embedding.weight.device)
        self.max_tokens = max_tokens
        self.num_slots = num_slots
        self._shard = model.shard
        self.state = _empty_state(model, num_slots, max_tokens, uses_mtp)
        self.deferred = empty_deferred_writes(model, self.state, deferred_writes)
        self._free = list(range(num_slots))[::-1]

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int | None:
        """Take a free slot, to be overwritten; returns None if all are taken."""
        return self._free.pop() if self._free else None

    def write(self, slot: int, state: ModelState | None) -> None:
        """Overwrite a slot with `state` (an empty state if None)."""
        self._forget(slot)
        if state is None:
            self.state.clear_(slot)
        else:
            self.state.write_(slot, state)

    def release(self, slot: int) -> None:
        """Clear a slot and give it back."""
        self.state.clear_(slot)
        self._forget(slot)
        self._free.append(slot)

    def release_all_but(self, slots: Collection[int]) -> None:
        """Clear all slots but these and give them back, whichever were taken."""
        self._free = []
        for slot in sorted(set(range(self.num_slots)).difference(slots), reverse=True):
            self.release(slot)

    def copy(self, slot: int) -> ModelState:
        """A copy of a slot's state without unused room; it includes the deferred writes."""
        state = self.state.slot(slot).trim().clone()
        for layer, ring in zip(state, self.deferred, strict=True):
            if ring is not None and isinstance(layer, RetentionState):
                layer.memory = ring.slot(slot).folded(layer.memory)
        return state

    def is_finite(self, state: ModelState) -> bool:
        """Whether a state holds neither NaN nor infinity; of a split model, on any process."""
        if self._shard is None:
            return state.is_finite
        broken = torch.tensor(not state.is_finite, dtype=torch.int32, device=state.position.device)
        return not bool(self._shard.largest_(broken))

    def _forget(self, slot: int) -> None:
        """Drop a slot's deferred writes; their memory is not read again."""
        ring = next((ring for ring in self.deferred if ring is not None), None)
        if ring is not None:  # all layers share the count
            ring.pending[slot] = 0


def check_servable(config: ModelConfig, max_tokens: int | None) -> None:
    """Raise ValueError for a model whose states do not fit slots of fixed size."""
    for i, layer in enumerate(config.layers):
        if layer.mixer.refused_by_engine:
            accepted = ", ".join(name for name, mixer in MIXERS.items() if not mixer.config.refused_by_engine)
            raise ValueError(
                f"layer {i} is {layer.mixer.kind}: {layer.mixer.refused_by_engine}; accepted by the engine: {accepted}"
            )
        if not layer.keeps_state:
            raise ValueError(f"layer {i} has keeps_state False; accepted by the engine: layers that keep their state")
    growing = growing_layer(config)
    if growing is not None and max_tokens is None:
        raise ValueError(
            f"layer {growing} is {config.layers[growing].mixer.kind} without a window, whose state grows; accepted: "
            "max_tokens, the tokens that a slot has room for"
        )
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; accepted: a positive integer or None")
    longest = [layer.mixer.longest_context for layer in config.layers]
    if max_tokens is not None and max_tokens > min(longest):
        where = longest.index(min(longest))
        raise ValueError(
            f"max_tokens is {max_tokens}; accepted: at most {min(longest)}, the max_context of layer {where}"
        )


def _check_fits(needed: int, num_slots: int, max_tokens: int | None, device: torch.device) -> None:
    """Raise ValueError before memory is taken that the device does not have at all."""
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else total_bytes()
    if needed > there > 0:
        raise ValueError(
            f"num_slots {quoted(num_slots)} (or its memory_bytes) with max_tokens {max_tokens} takes more memory than "
            f"the {format_bytes(there)} of {device}; accepted: less"
        )


def growing_layer(config: ModelConfig) -> int | None:
    """The first layer whose state grows with every token: attention without a window."""
    return next((i for i, layer in enumerate(config.layers) if layer.mixer.kept_tokens == math.inf), None)


def default_context(config: ModelConfig, speculation: Speculation | None) -> int | None:
    """Tokens that a slot has room for where nobody says how many: None, any number, unless a cache grows with them."""
    if growing_layer(config) is None and (speculation is None or not speculation.grows(config)):
        return None
    return int(min(GROWING_CONTEXT, *(layer.mixer.longest_context for layer in config.layers)))


@torch.no_grad()
def _draft_bytes(model: LanguageModel, width: int, mtp: bool) -> int:
    """Memory of the draft updates of `width` tokens of one sequence."""
    state = model.init_state(1, num_tokens=width, mtp=mtp)
    _, draft = model.draft(torch.zeros(1, width, dtype=torch.long, device=state.position.device), state)
    return draft.nbytes


def _empty_state(
    model: LanguageModel, num_sequences: int, max_tokens: int | None, mtp: bool, device: torch.device | None = None
) -> ModelState:
    """States of sequences before their first token, with room for max_tokens, or for every window if None. mtp: with
    those of multi-token prediction."""
    config = model.config
    if max_tokens is None:
        blocks = [*config.layers, *([config.mtp.block] if mtp and config.mtp is not None else [])]
        max_tokens = int(max(block.mixer.kept_tokens for block in blocks))
    return model.init_state(num_sequences, num_tokens=max_tokens, device=device, mtp=mtp)
