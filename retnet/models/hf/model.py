"""`RetNetForCausalLM`: the language model as transformers, PEFT and TRL expect one."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from retnet.layers.linear import is_plain_linear
from retnet.models.decode.decoder import FusedDecoder, running
from retnet.models.directory import MODEL_TYPE
from retnet.models.hf.body import HiddenStates, RetNetModel, warn_of_losses_left_out
from retnet.models.hf.cache import StateCache
from retnet.models.hf.config import RetNetConfig
from retnet.models.hf.inputs import IGNORED, Tokens, repeat_last_real, without_first_labels
from retnet.models.lm import LanguageModel


@dataclass
class CausalOutput(CausalLMOutputWithPast):
    """aux_loss: the weighted losses of routers in training, None without routers. mtp_loss: the weighted loss of
    multi-token prediction in training with labels, None without it. `loss` holds both already."""

    aux_loss: Tensor | None = None
    mtp_loss: Tensor | None = None


class RetNetForCausalLM(RetNetModel, GenerationMixin):
    """A language model with a loss, a cache and `generate`, whose one-token steps run fused where they can."""

    def __init__(self, config: RetNetConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # transformers looks for it in the class's name, which a subclass may change
        register_causal(type(self))
        self._share_generation_config()

    @classmethod
    def wrap(cls, model: LanguageModel) -> Self:
        wrapper = super().wrap(model)
        if model.generation_config is not None:
            wrapper.generation_config = model.generation_config
        wrapper._share_generation_config()
        return wrapper

    @property
    def generation_config(self) -> Any:
        """transformers' settings of `generate`, which the language model inside reads its end tokens from."""
        return self.__dict__.get("_generation_config")

    @generation_config.setter
    def generation_config(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.__dict__["_generation_config"] = value
        self._share_generation_config()

    def _share_generation_config(self) -> None:
        if isinstance(inner := self._modules.get("model"), LanguageModel):
            inner.generation_config = self.generation_config

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: HiddenStates = None,
        logits_to_keep: int | Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits and, with labels, the loss.

        Args:
            input_ids: [B, T]; or inputs_embeds [B, T, D] instead.
            attention_mask: [B, T], or [B, all tokens so far], 0 at padding. Padding gets the logits of the last real
                token before it, so that `generate` works with rows padded on either side.
            position_ids: [B, T]; where they restart, a new document begins with a fresh state. Without restarts
                inside a row they change nothing, as positions count real tokens.
            past_key_values: the cache of the earlier tokens; it is updated.
            labels: [B, T], as input_ids, not shifted; -100 is ignored, and so is the first token of a document.
            use_cache: return a cache. None: if one was given, or in evaluation without labels or packed documents
                unless `config.use_cache` is False.
            output_hidden_states: return the input of the first layer and the output of each, the last one after the
                final norm; a place or a list of places returns only those. None: `config.output_hidden_states`.
            logits_to_keep: how many last tokens, or which tokens, to return logits for; 0: all. None: all, unless
                `config.loss_without_logits`.
            cu_seq_lens_q: [N + 1] bounds of documents laid end to end, instead of position_ids.
            seq_idx: [B, T] number of each token's document, instead of position_ids.
            return_dict: False returns a tuple. None: `config.return_dict`.
            kwargs: for transformers' loss (num_items_in_batch, shift_labels, ignore_index), and what transformers and
                tokenizers pass to any model (`retnet.models.hf.keywords`).

        Raises ValueError for padding together with packed documents, for unsupported outputs and unknown keywords.
        """
        marks = (attention_mask, position_ids, cu_seq_lens_q, seq_idx)
        tokens = self._tokens(input_ids, inputs_embeds, past_key_values, *marks)
        for_loss = self._loss_keywords(kwargs, tokens, past_key_values, cu_seq_lens_q)
        if use_cache is None and labels is not None and past_key_values is None:
            use_cache = False
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        loss, logits, body, extra, ahead = None, None, None, None, None
        with nullcontext() if torch.compiler.is_compiling() else running(self.model):
            if (
                input_ids is not None
                and labels is None
                and use_cache is not False
                and (output_hidden_states is None or output_hidden_states is False)
                and not isinstance(logits_to_keep, Tensor)
            ):
                logits = self._decode_fused(input_ids, tokens, past_key_values)
            if logits is None:
                losses: list[Tensor] | None = [] if self.training else None
                inputs = (input_ids, inputs_embeds, past_key_values)
                body = self._body(tokens, *inputs, use_cache, output_hidden_states, losses)
                if labels is not None:
                    given = (input_ids, inputs_embeds)
                    loss, logits, extra, ahead = self._loss_and_logits(
                        body.hidden, labels, tokens, logits_to_keep, losses, given, **for_loss
                    )
                else:
                    extra = torch.stack(losses).sum() if losses else None
                    if "num_items_in_batch" in for_loss:
                        warn_of_losses_left_out(self.model)
                    hidden = body.hidden if tokens.mask is None else repeat_last_real(body.hidden, tokens.mask)
                    kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-(logits_to_keep or 0), None)
                    logits = self.model.logits(hidden[:, kept])
        output = CausalOutput(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if body is None else body.cache,
            hidden_states=None if body is None else body.hidden_states,  # type: ignore[arg-type]
            aux_loss=extra,
            mtp_loss=ahead,
        )
        return self._returned(output, return_dict)

    def _decode_fused(self, input_ids: Tensor, tokens: Tokens, cache: StateCache | None) -> Tensor | None:
        """Logits [B, 1, vocab] of one token per sequence by the fused decode step, or None where the modules must run.

        The modules run for longer inputs, without earlier tokens, with padding, with gradients, while compiling, under
        autocast, and for models that the fused step does not support (adapters, offloading, int8 weights).
        """
        state = None if cache is None else cache.state
        if cache is None or state is None or input_ids.shape[1] != 1 or tokens.mask is not None:
            return None
        if cache.decoder is None or cache.decoder.model is not self.model:
            cache.decoder = FusedDecoder(self.model, int8=False)
        stepped = cache.decoder.step(input_ids[:, 0], state)
        if stepped is None:
            return None
        logits, state = stepped
        cache.update_state(state, 1)
        return logits[:, None]

    def _loss_and_logits(
        self,
        hidden: Tensor,
        labels: Tensor,
        tokens: Tokens,
        logits_to_keep: int | Tensor | None,
        router_losses: list[Tensor] | None,
        given: tuple[Tensor | None, Tensor | None],
        *,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        ignore_index: int = IGNORED,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The loss, the logits unless it is computed without them, and the losses that it holds of routers and of
        multi-token prediction.

        All are means over the batch, as the cross-entropy is: they count by the batch's share of the targets of their
        optimizer step, if their number is given. given: ids and embeddings.
        """
        if logits_to_keep is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError(f"logits_to_keep is {logits_to_keep} with labels; accepted with labels: None or 0")
        if shift_labels is None:
            if tokens.bounds is not None:
                labels = without_first_labels(labels, tokens.bounds)
            shift_labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].contiguous()
        if ignore_index != IGNORED:
            shift_labels = shift_labels.masked_fill(shift_labels == ignore_index, IGNORED)
        share = 1.0 if num_items_in_batch is None else (shift_labels != IGNORED).sum() / num_items_in_batch
        ahead = self._loss_ahead(hidden, shift_labels, tokens, router_losses, *given)
        ahead = None if ahead is None else ahead * share
        extra = torch.stack(router_losses).sum() * share if router_losses else None
        without = self.config.loss_without_logits and logits_to_keep is None
        if without and self.model.training and is_plain_linear(self.model.head):
            loss = self.model.mean_nats(hidden, shift_labels) * share
            return sum((x for x in (extra, ahead) if x is not None), loss), None, extra, ahead
        logits = self.model.logits(hidden)
        options = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels}
        size = self.model.config.vocab_size
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **options)
        return sum((x for x in (extra, ahead) if x is not None), loss), logits, extra, ahead

    def _loss_ahead(
        self,
        hidden: Tensor,
        labels: Tensor,
        tokens: Tokens,
        router_losses: list[Tensor] | None,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor | None:
        """The loss of multi-token prediction in training, which router losses of its own are added to."""
        if self.model.mtp is None or not self.model.training:
            return None
        if tokens.bounds is not None:  # documents laid end to end
            hidden, labels = hidden.flatten(0, 1)[None], labels.reshape(1, -1)
            input_ids = None if input_ids is None else input_ids.reshape(1, -1)
            inputs_embeds = None if inputs_embeds is None else inputs_embeds.flatten(0, 1)[None]
        return self.model.ahead(
            hidden, input_ids, embeddings=inputs_embeds, labels=labels, mask=tokens.mask, cu_seqlens=tokens.bounds,
            losses=router_losses,
        ).loss  # fmt: skip

    @property
    def base_model(self) -> RetNetModel:
        """The model without its head, of the same weights, for losses that apply the head themselves (TRL)."""
        body = self.__dict__.get("_without_head")
        if body is None or body.model is not self.model or body.config is not self.config:
            body = RetNetModel(cast(RetNetConfig, self.config), self.model)
            self.__dict__["_without_head"] = body  # beside the submodules, which it shares
        return body

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> tuple[Tensor, str, dict[str, Any]]:
        """The hook where `generate` chooses its inputs. Raises ValueError where there is no token to continue."""
        tensor, name, others = super()._prepare_model_inputs(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if 0 in tensor.shape[:2]:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; accepted: at least one row and one token, or no {name} for a "
                "text that begins with bos_token_id"
            )
        return tensor, name, others

    def _prepare_cache_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> None:
        """The hook where `generate` makes its cache: a `StateCache`."""
        if not self._keeps_state:
            generation_config.use_cache = False
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            accepted = (None, "dynamic", "static")
            chosen = generation_config.cache_implementation
            if chosen not in accepted:
                raise ValueError(f"cache_implementation is {chosen!r}; accepted: {', '.join(map(repr, accepted))}")
            model_kwargs["past_key_values"] = StateCache(compiled=chosen == "static")

    @staticmethod
    def create_masks_for_generate(
        config: RetNetConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: StateCache | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> Tensor | None:
        """The mask of a compiled step, in a constant shape: none, because `generate` appends real tokens only."""
        if attention_mask is None or (inputs_embeds.shape[1] == 1 and not is_first_iteration):
            return None
        return attention_mask[:, -inputs_embeds.shape[1] :]


def register_causal(cls: type) -> None:
    """Enter a class into the table by whose names transformers knows causal models.

    Trainer shifts the labels that it smooths, and pipelines accept a model, only if its class's name is there.
    """
    key = MODEL_TYPE if cls is RetNetForCausalLM else f"{MODEL_TYPE}.{cls.__name__}"
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[key] = cls.__name__
