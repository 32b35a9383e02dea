"""`StateCache`: the states of a model as a transformers cache, for `generate` and for continued conversations.

transformers' own linear-attention cache layers hold no position, cannot be repeated or selected along the batch, and
count tokens only beside an attention layer. Our states can do all that for every mixer, so the cache holds a whole
`ModelState`. Left out: removing tokens, which is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache

from retnet.models.decode.decoder import FusedDecoder
from retnet.models.states import ModelState


class StateCache(Cache):
    """The state after the tokens seen so far; None before the first.

    columns: tokens seen, with padding, equal for all sequences; transformers slices its ids and masks by it.
    compiled: states keep their memory addresses, so that a compiled step can be replayed as a CUDA graph.
    decoder: the fused step that continues it; the model's packed weights live as long as some cache needs them.
    """

    def __init__(self, state: ModelState | None = None, *, compiled: bool = False):
        super().__init__(layers=[])
        self.state: ModelState | None = None
        self.columns: Tensor | None = None
        self.compiled = compiled
        self.decoder: FusedDecoder | None = None
        if state is not None:
            self.update_state(state, int(state.position.max()))

    def update_state(self, state: ModelState, num_columns: int) -> None:
        """Set the state after `num_columns` more tokens of every sequence."""
        self.state = state
        if self.columns is None:
            # A tensor, because a number that changes with every token would make a compiled step compile again.
            self.columns = torch.full((), num_columns, device=state.position.device)
            if self.compiled and not torch.compiler.is_compiling():
                self._fix_addresses()
        else:
            self.columns += num_columns

    def _fix_addresses(self) -> None:
        """Tell torch.compile that these tensors are updated in place and need not be copied as inputs."""
        for layer in self.state or ():
            if layer.per_token:
                raise ValueError(
                    f"cache_implementation 'static' needs states of constant size; {type(layer).__name__} grows with "
                    "the tokens. Accepted for this model: cache_implementation None"
                )
            for x in layer.tensors().values():
                torch._dynamo.mark_static_address(x)
        torch._dynamo.mark_static_address(self.columns)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, with padding."""
        return 0 if self.columns is None else int(self.columns)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no limit."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(length, offset) of a mask over all tokens."""
        return self.get_seq_length() + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let beam i continue from beam beam_idx[i]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices` [M], in that order, repetitions allowed."""
        if self.state is not None:
            self.state = self.state.select(indices.to(self.state.position.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times in a row."""
        if self.state is not None:
            self.state = self.state.repeat(repeats)

    def reset(self) -> None:
        """Forget everything."""
        self.state = self.columns = None

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ValueError unless nothing is to be removed: a state is a sum from which no token can be removed."""
        if tokens_to_remove:
            raise ValueError(
                f"tokens_to_remove is {tokens_to_remove}; accepted: 0. Copy the cache (copy.deepcopy) before "
                "tokens that may have to be removed"
            )

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else len(self.state.position)

    @property
    def is_compileable(self) -> bool:
        return self.compiled

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self)

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.layers)

    def __repr__(self) -> str:
        return f"StateCache(batch_size={self.batch_size}, tokens={self.get_seq_length()}, layers={len(self)})"
