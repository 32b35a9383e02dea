"""Multi-token prediction: modules that each predict one token further ahead (DeepSeek-V3, arXiv 2412.19437, 2.2).

    h_k[t] = norm(blocks(P [norm(h_{k-1}[t - 1]), norm(e[t])]))        k = 1 .. n; h_0: the model's final hidden states

e[t] is the embedding of token t, and the model's own head turns h_k[t] into logits of token t + 1. So module k predicts
k tokens further than the model's hidden state that it continues. Indices are those of the token that a module reads,
not of the hidden state as in the paper: all modules then share the labels, positions and documents of the model.

A document's first token has no hidden state before it; zeros take its place. The paper's modules begin k tokens later.
The loss here leaves out the first k tokens, as the paper's does.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from retnet.layers.block import Block, BlockConfig, connect_streams
from retnet.layers.draft import Draft
from retnet.layers.growth import Growths
from retnet.layers.norm import make_norm
from retnet.layers.short_convolution import advance_recent_
from retnet.layers.state import LayerState, no_tokens
from retnet.layers.token_layout import TokenLayout
from retnet.ops.dtypes import wide_dtype
from retnet.ops.norms import Norm
from retnet.system.choices import check_choices

MOST_MODULES = 64
MOST_BLOCKS = 64
# (block, x, state, layout) -> (x, state or draft)
Run = Callable[[nn.Module, Tensor, Any, TokenLayout], tuple[Tensor, Any]]


@dataclass(frozen=True)
class MultiTokenConfig:
    """num_modules: tokens predicted beyond the next one. block, num_blocks: the blocks of a module, all alike.

    loss_weight: of the mean loss of all modules in training. norm: of both inputs and of the output.
    """

    block: BlockConfig
    num_modules: int = 1
    num_blocks: int = 1
    loss_weight: float = 0.1
    norm: Norm = "rms"
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 < self.norm_eps < math.inf:  # the norm of zeros, before a document's first token, is 0 / eps
            raise ValueError(f"norm_eps is {self.norm_eps}; accepted: a number above 0")
        for name, most in (("num_modules", MOST_MODULES), ("num_blocks", MOST_BLOCKS)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: 1 to {most}")
        if not 0 <= self.loss_weight < math.inf:
            raise ValueError(f"loss_weight is {self.loss_weight}; accepted: a number of at least 0")


@dataclass
class PreviousHidden(LayerState):
    """previous [N, 1, D]: the hidden state h_{k-1} of the last token."""

    previous: Tensor


@dataclass
class PreviousHiddenDraft(Draft):
    """The hidden states h_{k-1} [B, T, D] of tokens that may yet be rejected."""

    hidden: Tensor

    def _write_(self, state: PreviousHidden, counts: Tensor) -> None:
        advance_recent_(state.previous, self.hidden, counts)


class MultiTokenModule(nn.Module):
    """Hidden states h_{k-1} before each token, and embeddings [B, T, D] -> h_k [B, T, D]."""

    GROWTH: ClassVar[Growths] = {"projection": "hidden"}

    def __init__(self, config: MultiTokenConfig, d_model: int):
        super().__init__()
        self.hidden_norm = make_norm(config.norm, d_model, config.norm_eps)
        self.embedding_norm = make_norm(config.norm, d_model, config.norm_eps)
        self.projection = nn.Linear(2 * d_model, d_model, bias=False)
        self.blocks = nn.ModuleList(Block(config.block, d_model) for _ in range(config.num_blocks))
        connect_streams(self.blocks)
        self.final_norm = make_norm(config.norm, d_model, config.norm_eps)

    def forward(
        self, previous: Tensor, embedded: Tensor, states: Sequence[LayerState | None], layout: TokenLayout, run: Run
    ) -> tuple[Tensor, list[Any]]:
        """The second result: the blocks' states, or drafts with `layout.deferred`."""
        x = self.projection(torch.cat([self.hidden_norm(previous), self.embedding_norm(embedded)], -1))
        after: list[Any] = []
        for block, state in zip(self.blocks, states, strict=True):
            x, result = run(block, x, state, layout)
            after.append(result)
        return self.final_norm(x), after


class MultiTokenPrediction(nn.ModuleList):
    """All modules of a model. Their states are one sequence: of each module `PreviousHidden`, then of its blocks."""

    def __init__(self, config: MultiTokenConfig, d_model: int):
        super().__init__(MultiTokenModule(config, d_model) for _ in range(config.num_modules))
        self.config, self.d_model = config, d_model

    def prepare(self, layout: TokenLayout, dtype: torch.dtype) -> None:
        """Compute what is shared with other layers and calls: a block compiled or recomputed alone only reads it."""
        for module in self:
            for block in cast(MultiTokenModule, module).blocks:
                cast(Block, block).prepare(layout, dtype)

    def init_state(
        self, batch: int, device: torch.device, dtype: torch.dtype, num_tokens: int = 0
    ) -> tuple[LayerState, ...]:
        """The states of `batch` sequences before their first token, as `MixerModule.init_state` has them."""
        states: list[LayerState] = []
        for module in self:
            zeros = torch.zeros(batch, 1, self.d_model, device=device, dtype=dtype)
            states.append(PreviousHidden(no_tokens(batch, device), zeros))
            for block in cast(MultiTokenModule, module).blocks:
                states.append(cast(Block, block).mixer.init_state(batch, device, dtype, num_tokens))
        return tuple(states)

    def forward(
        self, hidden: Tensor, embedded: Tensor, states: Sequence[LayerState] | None, layout: TokenLayout, run: Run
    ) -> tuple[list[Tensor], tuple[Any, ...]]:
        """h_1 .. h_n [B, T, D] of tokens with final hidden states h_0 and embeddings [B, T, D], and the states after
        them with `layout.carry`, or drafts with `layout.deferred`; otherwise the second result is empty."""
        through, inputs = partial(self._through, run), torch.cat([hidden, embedded], -1)
        if layout.must_pack(states):
            outputs, after = layout.on_real_tokens(through, inputs, states)
        else:
            outputs, after = through(inputs, states, layout)
        kept = layout.carry or layout.deferred
        return list(outputs.chunk(len(self), -1)), tuple(after or ()) if kept else ()

    def loss(
        self,
        outputs: Sequence[Tensor],
        labels: Tensor,
        positions: Tensor,
        mean_nats: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """The weighted loss of h_1 .. h_n [B, T, D] in nats: loss_weight / n times the sum over modules of

            sum over targets of -log p(label) / number of labels of the model

        labels [B, T] are those of the model (the token after each, -100: ignored). Module k has no targets where
        positions [B, T] in documents are below k: at the first k tokens, and at masked ones, whose position is -1.
        mean_nats: of (hidden, labels).
        """
        total = torch.zeros((), dtype=wide_dtype(outputs[0].dtype), device=labels.device)
        count = (labels != -100).sum().clamp_min(1).to(total.dtype)
        for k, hidden in enumerate(outputs, 1):
            targets = labels.masked_fill(positions < k, -100)
            nats = mean_nats(hidden, targets)
            total = total + nats * ((targets != -100).sum() / count)
        return total * (self.config.loss_weight / len(outputs))

    def guess(
        self,
        tokens: Tensor,
        states: Sequence[LayerState],
        count: int,
        embed: Callable[[Tensor], Tensor],
        choose: Callable[[Tensor, int], Tensor],
    ) -> Tensor:
        """Guesses [S, count] of the tokens after `tokens` [S], which the states have not read. The states stay as they
        are.

        Module k makes guess k: it reads the tokens and the guesses before it, as a draft, so that no state is copied.
        The last module makes the guesses beyond the number of modules, and then continues its own hidden states.

        embed: ids [S, T] -> embeddings [S, T, D]. choose: (h_k [S, D], number of the guess from 1) -> tokens [S].
        """
        size, ids = 1 + self.config.num_blocks, tokens[:, None]
        previous = cast(PreviousHidden, states[0]).previous
        for number in range(1, count + 1):
            k = min(number, len(self))
            before = states[(k - 1) * size : k * size]
            layout = TokenLayout.of((len(ids), number), ids.device, start=before[0].position, deferred=True)
            hidden, _ = cast(MultiTokenModule, self[k - 1])(previous, embed(ids), before[1:], layout, run_block)
            if k < len(self):
                previous = torch.cat([cast(PreviousHidden, states[k * size]).previous, hidden], 1)
            else:
                previous = torch.cat([previous, hidden[:, -1:]], 1)
            ids = torch.cat([ids, choose(hidden[:, -1], number)[:, None]], 1)
        return ids[:, 1:]

    def _through(
        self, run: Run, inputs: Tensor, states: Sequence[LayerState] | None, layout: TokenLayout
    ) -> tuple[Tensor, list[Any]]:
        """Inputs h_0 and e [B, T, 2 D] -> h_1 .. h_n [B, T, n D], and all states or drafts."""
        size = 1 + self.config.num_blocks
        hidden, embedded = inputs.chunk(2, -1)
        outputs, after = [], []
        for k, module in enumerate(self):
            first, *own = [None] * size if states is None else states[k * size : (k + 1) * size]
            previous, last = _previous_hidden(hidden, cast(PreviousHidden | None, first), layout)
            after.append(last)
            hidden, results = module(previous, embedded, own, layout, run)
            after += results
            outputs.append(hidden)
        return torch.cat(outputs, -1), after


def run_block(block: nn.Module, x: Tensor, state: Any, layout: TokenLayout) -> tuple[Tensor, Any]:
    """A block without recomputation."""
    return block(x, state, layout)


def _previous_hidden(hidden: Tensor, state: PreviousHidden | None, layout: TokenLayout) -> tuple[Tensor, Any]:
    """The hidden state before each token [B, T, D], and the state or draft after all of them."""
    before = None if state is None else state.previous.to(hidden.dtype)
    num_sequences, cu_seqlens = len(layout.lengths), layout.cu_seqlens
    if layout.context is not None:
        before = layout.context.recent(hidden[:, -1:], num_sequences)
    if before is None:
        before = hidden.new_zeros(num_sequences, 1, hidden.shape[-1])
    if cu_seqlens is None:
        spread = torch.cat([before, hidden], 1)
        previous, last = spread[:, :-1], spread[:, -1:]
    else:
        sequences, ends = layout.sequences[0], cu_seqlens.long()[1:] - 1
        begins = torch.ones_like(sequences, dtype=torch.bool)
        begins[1:] = sequences[1:] != sequences[:-1]
        spread = torch.cat([before[:1], hidden], 1)  # a row before the first token, which is of no document
        previous = torch.where(begins[:, None], before[sequences, 0], spread[0, :-1])[None]
        last = torch.where((layout.lengths > 0)[:, None, None], spread[0, ends + 1][:, None], before)
    if layout.deferred:
        return previous, PreviousHiddenDraft(hidden)
    if not layout.carry:
        return previous, None
    if layout.mask is not None:  # of one token per row
        last = torch.where(layout.mask[..., None], last, before)
    return previous, PreviousHidden.after(state, layout, previous=last)
