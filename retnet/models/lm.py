"""The language model: embedding, blocks, final norm, head. Plain torch; the Hugging Face classes are in `models/hf`."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retnet.layers.block import Block, connect_streams
from retnet.layers.growth import Growths
from retnet.layers.hyper_connection import merge_streams
from retnet.layers.linear import is_plain_linear
from retnet.layers.mixers import mixer_of
from retnet.layers.moe import MoE
from retnet.layers.multi_token import MultiTokenPrediction, Run, run_block
from retnet.layers.norm import LayerNorm, RMSNorm, make_norm
from retnet.layers.offload import waiting_on_host
from retnet.layers.recompute import Recompute, with_losses
from retnet.layers.state import LayerState
from retnet.layers.token_layout import TokenLayout
from retnet.layers.weight_roles import WeightRoles
from retnet.models.config import ModelConfig
from retnet.models.config_json import token_ids_in_vocabulary
from retnet.models.init import initialize
from retnet.models.loss import linear_cross_entropy
from retnet.models.parallel.context import check_layers_on_shards
from retnet.models.parallel.vocabulary import VocabularyHead
from retnet.models.states import ModelDraft, ModelState
from retnet.ops.context_shard import ContextShard
from retnet.ops.dtypes import wide_dtype
from retnet.ops.tensor_shard import TensorShard


@dataclass
class ModelOutput:
    """logits [B, T, vocab]; the state after the last token with `carry`; the loss of MoE routers, None without them."""

    logits: Tensor
    state: ModelState | None
    auxiliary_loss: Tensor | None = None


@dataclass
class Ahead:
    """Multi-token prediction over some tokens.

    hidden: [B, T, D] of each module, ready for `logits`. states: after the tokens, with `carry`. loss: weighted, None
    without labels.
    """

    hidden: list[Tensor]
    states: tuple[LayerState, ...]
    loss: Tensor | None


class LanguageModel(nn.Module):
    """Token ids in, logits out, states passed in and returned.

    Weights are drawn in config.dtype from `seed` (config.seed if None), whatever torch's global generator holds. Under
    `torch.device("meta")` nothing is allocated.

    recompute: what the backward of a training step computes again; settable at any time.
    directory: where the weights were loaded from, if they were; a tokenizer may lie beside them.
    generation_config: transformers', of a model with its interface; its `generate` reads the end tokens from there.
    shard: which part of a model this is whose layers are split over processes (`retnet.models.parallel.plan`).
    """

    WEIGHT_ROLES: ClassVar[WeightRoles] = {"embedding": "embedding", "head": "embedding"}
    GROWTH: ClassVar[Growths] = {"embedding": "input", "head": "input"}  # the head with `logit_scale` (models/mup.py)
    directory: Path | None = None
    generation_config: Any = None
    shard: TensorShard | None = None

    def __init__(self, config: ModelConfig, *, seed: int | None = None):
        super().__init__()
        self.config = config
        self.recompute = Recompute("layer" if config.gradient_checkpointing else "none")
        # Computes a layer again in the backward; the Hugging Face classes put their user's choice here.
        self.checkpoint: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.embedding_norm = make_norm(config.embedding_norm, config.d_model, config.norm_eps)
        self._stateless = ", ".join(f"layer {i}" for i, layer in enumerate(config.layers) if not layer.keeps_state)
        self.layers = nn.ModuleList(Block(layer, config.d_model) for layer in config.layers)
        connect_streams(self.layers)
        self.final_norm = make_norm(config.final_norm, config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.mtp = None if config.mtp is None else MultiTokenPrediction(config.mtp, config.d_model)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        initialize(self, config, config.seed if seed is None else seed)
        self.to(config.torch_dtype)
        if config.float32_norms:
            for module in self.modules():
                if isinstance(module, (LayerNorm, RMSNorm)):
                    module.float()
                elif isinstance(module, MoE):
                    module.router.float()
            for name, weight in self.named_parameters():
                if name.endswith("norm_weight"):  # of norms inside mixers
                    weight.data = weight.data.float()

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text: those of `generation_config` where it has any, otherwise the configuration's."""
        given = getattr(self.generation_config, "eos_token_id", None)
        ids = token_ids_in_vocabulary("eos_token_id", given, self.config.vocab_size)
        return self.config.eos_token_ids if ids is None else (ids,) if isinstance(ids, int) else ids

    def forward(
        self,
        ids: Tensor,
        state: ModelState | None = None,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        carry: bool = False,
        in_place: bool = False,
    ) -> ModelOutput:
        """Logits for every token.

        Args:
            ids: [B, T] int64.
            state: after the tokens that came before, for N = B sequences (or N packed documents).
            mask: [B, T] bool over these T tokens; False tokens (padding, or masked inside a row) have no effect.
            cu_seqlens: [N + 1] bounds of documents packed into one row (B = 1).
            carry: return the state after the last token.
            in_place: the given state may be overwritten (inference only); continue from the returned one.
        """
        losses: list[Tensor] | None = None if in_place else []
        hidden, state = self.hidden(
            ids, state, mask=mask, cu_seqlens=cu_seqlens, carry=carry, in_place=in_place, losses=losses
        )
        return ModelOutput(self.logits(hidden), state, torch.stack(losses).sum() if losses else None)

    def hidden(
        self,
        ids: Tensor | None,
        state: ModelState | None = None,
        *,
        embeddings: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        carry: bool = False,
        in_place: bool = False,
        losses: list[Tensor] | None = None,
        inner: list[Tensor] | None = None,
        context: ContextShard | None = None,
    ) -> tuple[Tensor, ModelState | None]:
        """Final hidden states [B, T, D], ready for `logits`, and the state; arguments as for `forward`.

        embeddings [B, T, D] take the place of ids, before config.embedding_scale. losses: a list to which layers add
        their own losses (mixtures of experts: balance and router z), already weighted. inner: a list to which the input
        of the first layer and the output of each layer are added; of several residual streams, their mean, which no
        layer reads. context: ids are this process's shard of longer rows, whose documents it knows; without state,
        mask, cu_seqlens and carry.
        """
        if context is not None:
            self._check_shard(context, state, mask, cu_seqlens, carry)
        if self._stateless and (carry or state is not None):
            raise ValueError(f"{self._stateless}: keeps_state is False; accepted there: no state, and carry False")
        x = self._embedded(ids, embeddings)
        start = None if state is None else state.position
        layout = self._layout(x, start, mask, cu_seqlens, carry, in_place, losses, context)
        for layer in self.layers:
            cast(Block, layer).prepare(layout, x.dtype)
        states, run = [], self._run_block(x.device)
        if inner is not None:
            inner.append(x)
        for i, layer in enumerate(self.layers):
            x, after = run(layer, x, None if state is None else state.layers[i], layout)
            states.append(after)
            if inner is not None:
                inner.append(merge_streams(x, self.config.d_model))
        return self.final_norm(x), ModelState(tuple(states)) if carry else None

    @property
    def _recompute_now(self) -> Recompute:
        return self.recompute if self.training and torch.is_grad_enabled() else Recompute()

    def _embedded(self, ids: Tensor | None, embeddings: Tensor | None = None) -> Tensor:
        """The input of the first layer [B, T, D]."""
        x = self.embedding(ids) if embeddings is None else embeddings
        return self.embedding_norm(x * self.config.embedding_scale)

    def _layout(
        self,
        x: Tensor,
        start: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        carry: bool,
        in_place: bool,
        losses: list[Tensor] | None,
        context: ContextShard | None,
    ) -> TokenLayout:
        """The layout of the tokens x [B, T, D] after `start` [N] tokens, as blocks of `_run_block` take it."""
        if context is not None:
            start, cu_seqlens = context.sequences(x.shape[0], x.shape[1], x.device)
        level = self._recompute_now.level
        return TokenLayout.of(
            (x.shape[0], x.shape[1]),
            x.device,
            start=start,
            mask=mask,
            cu_seqlens=cu_seqlens,
            carry=carry,
            in_place=in_place,
            losses=losses,
            context=context,
            recompute="none" if level == "layer" else level,
        )

    def _run_block(self, device: torch.device) -> Run:
        """Runs one block, which the backward runs again with level "layer"."""
        again = self._recompute_now
        if again.level != "layer":
            return run_block
        offloaded = waiting_on_host(device) if again.offload else nullcontext()

        def run(block: nn.Module, x: Tensor, before: Any, layout: TokenLayout) -> tuple[Tensor, Any]:
            with offloaded:
                x, after, own = self.checkpoint(with_losses, block, x, before, layout)
            if layout.losses is not None and own is not None:
                layout.losses.append(own)
            return x, after

        return run

    def ahead(
        self,
        hidden: Tensor,
        ids: Tensor | None,
        state: ModelState | None = None,
        *,
        labels: Tensor | None = None,
        embeddings: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        carry: bool = False,
        in_place: bool = False,
        losses: list[Tensor] | None = None,
        context: ContextShard | None = None,
    ) -> Ahead:
        """Multi-token prediction over tokens whose final hidden states [B, T, D] `hidden` returned.

        The other arguments are those of that call. state: continued if it has states of multi-token prediction.
        labels [B, T]: as for `loss`, which needs them.
        """
        if self.mtp is None:
            raise ValueError("the model has no multi-token prediction; accepted: a configuration with mtp")
        x = self._embedded(ids, embeddings)
        before = None if state is None or not state.mtp else state.mtp
        start = None if before is None else before[0].position
        layout = self._layout(x, start, mask, cu_seqlens, carry, in_place, losses, context)
        self.mtp.prepare(layout, x.dtype)
        outputs, after = self.mtp(hidden, x, before, layout, self._run_block(x.device))
        positions = layout.positions if mask is None else layout.positions.masked_fill(~mask, -1)
        loss = None if labels is None else self.mtp.loss(outputs, labels, positions, self.mean_nats)
        return Ahead(outputs, after, loss)

    def _check_shard(self, context: ContextShard, *others: object) -> None:
        """Raise ValueError for layers and arguments that context parallelism does not take."""
        check_layers_on_shards(self.config)
        if any(other is not None and other is not False for other in others):
            raise ValueError("a shard of a row came with a state, mask, cu_seqlens or carry; accepted: context alone")

    def init_state(
        self,
        batch: int,
        *,
        num_tokens: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        mtp: bool = False,
    ) -> ModelState:
        """The state of `batch` sequences before their first token; the model does not run.

        Args:
            num_tokens: KV caches (and Hyena's inputs) get room for so many tokens per sequence, or for their window
                where that is smaller. A cache without room grows when tokens come.
            device, dtype: of the activations that the state belongs to; those of the embedding if None.
            mtp: with the states of multi-token prediction.
        """
        device, dtype = device or self.embedding.weight.device, dtype or self.embedding.weight.dtype
        blocks = cast(Iterable[Block], self.layers)
        layers = tuple(block.mixer.init_state(batch, device, dtype, num_tokens) for block in blocks)
        ahead = self.mtp.init_state(batch, device, dtype, num_tokens) if mtp and self.mtp is not None else ()
        return ModelState(layers, ahead)

    @torch.no_grad()
    def draft(self, ids: Tensor, state: ModelState) -> tuple[Tensor, ModelDraft]:
        """Final hidden states of tokens [B, T] that may yet be rejected, and their updates of the state.

        The state is left as it is; `draft.accept_(state, counts)` writes the updates of accepted tokens. Raises
        ValueError if a layer's mixer has no drafts.
        """
        for i, layer in enumerate(self.config.layers):
            for mixer in layer.mixer.leaves:
                if mixer_of(mixer).draft is None:
                    raise ValueError(f"layer {i} has {mixer.kind}, which has no drafts; accepted: mixers with drafts")
        x = embedded = self._embedded(ids)
        layout = TokenLayout.of((x.shape[0], x.shape[1]), x.device, start=state.position, deferred=True)
        drafts = []
        for layer, before in zip(self.layers, state, strict=True):
            x, draft = layer(x, before, layout)
            drafts.append(draft)
        hidden, ahead = self.final_norm(x), ()
        if state.mtp and self.mtp is not None:
            layout = TokenLayout.of((x.shape[0], x.shape[1]), x.device, start=state.mtp[0].position, deferred=True)
            _, ahead = self.mtp(hidden, embedded, state.mtp, layout, run_block)
        return hidden, ModelDraft(tuple(drafts), ahead)

    @torch.no_grad()
    def guess(self, tokens: Tensor, state: ModelState, count: int, choose: Callable[[Tensor, int], Tensor]) -> Tensor:
        """Guesses [S, count] by multi-token prediction of the tokens after `tokens` [S], which the state has not read.

        choose: (logits [S, vocab], number of the guess from 1) -> tokens [S]. The state needs states of multi-token
        prediction, and is left as it is.
        """
        assert self.mtp is not None
        return self.mtp.guess(
            tokens, state.mtp, count, self._embedded, lambda hidden, number: choose(self.logits(hidden), number)
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., vocab], scaled and soft-capped if the configuration says so."""
        logits = self.head(self.before_head(hidden))
        cap = self.config.logit_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def before_head(self, hidden: Tensor) -> Tensor:
        """Final hidden states times config.logit_scale, whose products with the head's weight are the logits."""
        scale = self.config.logit_scale
        return hidden if scale == 1.0 else hidden * scale

    def loss(
        self,
        ids: Tensor,
        labels: Tensor,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        context: ContextShard | None = None,
    ) -> Tensor:
        """Mean cross-entropy in nats of labels [B, T] (already shifted; -100 is ignored) given ids [B, T].

        In training, plus the losses of routers and of multi-token prediction, if there are any. With `context`, this
        shard's share of the mean over whole rows: loss and gradients of all shards add up to those of one process.
        """
        losses: list[Tensor] | None = [] if self.training else None
        hidden, _ = self.hidden(ids, mask=mask, cu_seqlens=cu_seqlens, losses=losses, context=context)
        nats = self.mean_nats(hidden, labels)
        if self.training and self.mtp is not None:
            ahead = self.ahead(
                hidden, ids, labels=labels, mask=mask, cu_seqlens=cu_seqlens, losses=losses, context=context
            )
            assert ahead.loss is not None
            nats = nats + ahead.loss
        if context is not None:
            count = (labels != -100).sum()
            return nats * (count.to(nats.dtype) / context.total(count).clamp_min(1))
        return sum(losses or (), nats)

    def mean_nats(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in nats of labels [...] given final hidden states [..., D]; 0 if all are -100.

        The logits of all tokens are not held in memory, unless the head is more than its weight.
        """
        if isinstance(self.head, VocabularyHead):
            return self.head.mean_nats(self.before_head(hidden), labels, self.config.logit_soft_cap)
        if is_plain_linear(self.head):
            return linear_cross_entropy(self.before_head(hidden), self.head.weight, labels, self.config.logit_soft_cap)
        logits = self.logits(hidden).flatten(0, -2)
        nats = F.cross_entropy(
            logits.to(wide_dtype(logits.dtype)), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        return nats / (labels != -100).sum().clamp_min(1)
