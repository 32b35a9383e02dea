"""The pool: the states of all slots in one set of tensors that never move or grow, and what a slot costs.

A slot is a row. It is overwritten whole when a request enters it, and cleared when it leaves: attention multiplies what
it must not see by zero, and zero times a leftover NaN is NaN.
"""

import math
from dataclasses import dataclass

import torch

from retnet.layers.mixers import MIXERS
from retnet.layers.retention import RetentionState
from retnet.models.config import ModelConfig
from retnet.models.decode.fused import empty_deferred_writes
from retnet.models.decode.sampling import SamplingTable, is_integer
from retnet.models.lm import LanguageModel
from retnet.models.states import ModelState


@dataclass(frozen=True)
class SlotCost:
    """Bytes that one slot keeps: the state (its attention layers sized for max_tokens) with the rows beside it, of
    deferred writes or of a draft, and the sampling tables."""

    state: int
    sampling: int

    @property
    def total(self) -> int:
        return self.state + self.sampling

    def __str__(self) -> str:
        return f"{self.total:,} bytes a slot ({self.state:,} of state, {self.sampling:,} of sampling tables)"


class SlotPool:
    """`num_slots` slots of a model, by number or by a budget in bytes; states of requests of up to max_tokens.

    deferred_writes: rows that a retention state may lie behind, kept in `rings` beside it (0: none).
    draft_tokens: that a step may guess; their rows are kept by the step, and counted here.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        num_slots: int | None = None,
        memory_bytes: int | None = None,
        max_tokens: int | None = None,
        deferred_writes: int = 0,
        draft_tokens: int = 0,
    ):
        check_servable(model.config, max_tokens)
        if (num_slots is None) == (memory_bytes is None):
            raise ValueError(f"num_slots is {num_slots}, memory_bytes {memory_bytes}; accepted: one of the two")
        one = _blank(model, 1, max_tokens)
        rows = sum(ring.nbytes for ring in empty_deferred_writes(model, one, deferred_writes) if ring is not None)
        if draft_tokens:
            rows += _draft_bytes(model, one, draft_tokens + 1)
        self.cost = SlotCost(one.nbytes + rows, SamplingTable.bytes_per_slot(model.config.vocab_size))
        if memory_bytes is not None:
            affordable = memory_bytes // self.cost.total
            num_slots = min(1, affordable) if affordable < 4 else affordable // 4 * 4
            if num_slots < 1:
                raise ValueError(f"memory_bytes is {memory_bytes:,}; accepted: at least {self.cost}")
        assert num_slots is not None
        # Products round a row alike wherever it lies only if their rows fill the blocks of the CPU's kernels.
        if not is_integer(num_slots, 1) or (num_slots > 1 and num_slots % 4):
            raise ValueError(f"num_slots is {num_slots}; accepted: 1 or a multiple of 4, where all slots round alike")
        self.max_tokens = max_tokens
        self.num_slots = num_slots
        self.state = _blank(model, num_slots, max_tokens)
        self.deferred = empty_deferred_writes(model, self.state, deferred_writes)
        self._free = list(range(num_slots))[::-1]

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, state: ModelState | None) -> int | None:
        """A free slot that holds `state` (nothing if None); None if all are taken."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._forget(slot)
        if state is None:
            self.state.clear_(slot)
        else:
            self.state.write_(slot, state)
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back, with nothing left in it."""
        self.state.clear_(slot)
        self._forget(slot)
        self._free.append(slot)

    def copy(self, slot: int) -> ModelState:
        """A copy of a slot's state without unused room; it includes the deferred writes."""
        state = self.state.slot(slot).trim().clone()
        for layer, ring in zip(state, self.deferred, strict=True):
            if ring is not None and isinstance(layer, RetentionState):
                layer.memory = ring.slot(slot).folded(layer.memory)
        return state

    def _forget(self, slot: int) -> None:
        """Drop a slot's rows; what lies there is not read again."""
        ring = next((ring for ring in self.deferred if ring is not None), None)
        if ring is not None:  # the count is one for all layers
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


def growing_layer(config: ModelConfig) -> int | None:
    """The first layer whose state grows with every token: attention without a window."""
    return next((i for i, layer in enumerate(config.layers) if layer.mixer.kept_tokens == math.inf), None)


@torch.no_grad()
def _draft_bytes(model: LanguageModel, state: ModelState, width: int) -> int:
    """Of the rows that `width` tokens of one sequence would write."""
    _, rows = model.draft(torch.zeros(1, width, dtype=torch.long, device=state.position.device), state)
    return rows.nbytes


def _blank(model: LanguageModel, num_sequences: int, max_tokens: int | None) -> ModelState:
    """States of sequences that have seen nothing, with room for max_tokens, or for every window if None."""
    room = max(layer.mixer.kept_tokens for layer in model.config.layers) if max_tokens is None else max_tokens
    return model.init_state(num_sequences, num_tokens=int(room))
