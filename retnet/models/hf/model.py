"""`RetNetForCausalLM` and `RetNetModel`: the language model as transformers, PEFT and TRL expect one.

Left out: attention weights and the hidden states of every layer, which are refused if asked for, and tensor
parallelism.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from retnet.layers.linear import is_plain_linear
from retnet.models.decode.decoder import FusedDecoder, running
from retnet.models.directory import MODEL_TYPE
from retnet.models.hf.cache import StateCache
from retnet.models.hf.config import RetNetConfig
from retnet.models.hf.inputs import IGNORED, Tokens, repeat_last_real, without_first_labels
from retnet.models.hf.pretrained import RetNetPreTrainedModel, drawn_seed
from retnet.models.lm import LanguageModel


class RetNetModel(RetNetPreTrainedModel):
    """The model without its head: final hidden states."""

    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: RetNetConfig):
        super().__init__(config)
        core = config.core
        on_meta = torch.get_default_device().type == "meta"  # nothing is drawn there, and torch's generator stays as is
        self.model = LanguageModel(core, seed=core.seed if on_meta else drawn_seed())
        for module in self.model.modules():
            module._is_hf_initialized = not on_meta  # type: ignore[assignment]
        self.post_init()

    @classmethod
    def wrap(cls, model: LanguageModel) -> Self:
        """A wrapper of an existing model; both share the weights."""
        with torch.device("meta"):
            wrapper = cls(RetNetConfig.of(model.config))
        wrapper.model = model
        return wrapper

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Hidden states [B, T, D] after the final norm; arguments as for `RetNetForCausalLM.forward`."""
        _refuse_unknown_outputs(kwargs)
        marks = (attention_mask, position_ids, cu_seq_lens_q)
        shape, tokens = self._tokens(input_ids, inputs_embeds, past_key_values, *marks)
        hidden, cache = self._hidden(shape, tokens, input_ids, inputs_embeds, past_key_values, use_cache)
        output = BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

    def _tokens(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        cache: StateCache | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seq_lens: Tensor | None,
    ) -> tuple[tuple[int, int], Tokens]:
        """(B, T), and the mask or document boundaries of these tokens."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("accepted: one of input_ids and inputs_embeds")
        if cache is not None and not isinstance(cache, StateCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}; accepted: retnet.hf.StateCache or None")
        shape = (given.shape[0], given.shape[1])
        continued = cache is not None and cache.state is not None
        return shape, Tokens.of(shape, attention_mask, position_ids, cu_seq_lens, continued)

    def _hidden(
        self,
        shape: tuple[int, int],
        tokens: Tokens,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        cache: StateCache | None,
        use_cache: bool | None,
        losses: list[Tensor] | None = None,
    ) -> tuple[Tensor, StateCache | None]:
        """Final hidden states [B, T, D] and the cache after them: the given one, or a new one."""
        packed = tokens.bounds is not None
        if use_cache is None:
            use_cache = cache is not None or not (self.training or packed or not self._keeps_state)
        if use_cache and packed:
            raise ValueError("use_cache is True for packed documents; accepted: False, as their states are not kept")
        if packed:
            input_ids = None if input_ids is None else input_ids.reshape(1, -1)
            inputs_embeds = None if inputs_embeds is None else inputs_embeds.flatten(0, 1)[None]
        hidden, state = self.model.hidden(
            input_ids,
            None if cache is None else cache.state,
            embeddings=inputs_embeds,
            mask=tokens.mask,
            cu_seqlens=tokens.bounds,
            carry=use_cache,
            in_place=use_cache and cache is not None and not torch.is_grad_enabled(),
            losses=losses,
        )
        if state is not None:
            cache = StateCache() if cache is None else cache
            cache.update_state(state, shape[1])
        return hidden.view(*shape, -1), cache if use_cache else None

    @property
    def _keeps_state(self) -> bool:
        return all(layer.keeps_state for layer in self.model.config.layers)

    @property
    def base_model(self) -> nn.Module:
        return self

    @property
    def gradient_checkpointing(self) -> bool:
        """Set by transformers, after it has stored the function to use in `_gradient_checkpointing_func`."""
        return self.model.config.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.model.config = replace(self.model.config, gradient_checkpointing=enable)
        if enable:
            self.model.checkpoint = self._gradient_checkpointing_func

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_submodule("embedding", value)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.set_submodule("head", new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize as transformers does, and update the core configuration."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.model.config = replace(self.config.core, gradient_checkpointing=self.model.config.gradient_checkpointing)
        return embeddings


class RetNetForCausalLM(RetNetModel, GenerationMixin):
    """A language model with a loss, a cache and `generate`, whose one-token steps run fused where they can."""

    def __init__(self, config: RetNetConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # transformers looks for it in the class's name, which a subclass may change
        register_causal(type(self))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits and, with labels, the loss.

        Args:
            input_ids: [B, T]; or inputs_embeds [B, T, D] instead.
            attention_mask: [B, T], or [B, all tokens so far], 0 at padding. Padding gets the logits of the last real
                token before it, so that `generate` works with rows padded on either side.
            position_ids: [B, T]; where they restart at 0, a new document begins with a fresh state. Without restarts
                inside a row they change nothing, as positions count real tokens.
            past_key_values: the cache of the earlier tokens; it is updated.
            labels: [B, T], as input_ids, not shifted; -100 is ignored, and so is the first token of a document.
            use_cache: return a cache. None: if one was given, or in evaluation without labels or packed documents.
            logits_to_keep: how many last tokens, or which tokens, to return logits for; 0: all. None: all, except in
                training with labels, where the loss is computed without holding them in memory.
            cu_seq_lens_q: [N + 1] bounds of documents laid end to end, instead of position_ids.
            kwargs: for transformers' loss (num_items_in_batch).

        Raises ValueError for padding together with packed documents, and for unsupported outputs.
        """
        _refuse_unknown_outputs(kwargs)
        marks = (attention_mask, position_ids, cu_seq_lens_q)
        shape, tokens = self._tokens(input_ids, inputs_embeds, past_key_values, *marks)
        if use_cache is None and labels is not None and past_key_values is None:
            use_cache = False
        loss, logits, cache = None, None, past_key_values
        with nullcontext() if torch.compiler.is_compiling() else running(self.model):
            if (
                input_ids is not None
                and labels is None
                and use_cache is not False
                and not isinstance(logits_to_keep, Tensor)
            ):
                logits = self._decode_fused(input_ids, tokens, cache)
            if logits is None:
                losses: list[Tensor] | None = None if labels is None else []
                hidden, cache = self._hidden(shape, tokens, input_ids, inputs_embeds, cache, use_cache, losses)
                if labels is not None:
                    loss, logits = self._loss_and_logits(hidden, labels, tokens, logits_to_keep, **kwargs)
                    loss = sum(losses or (), loss)
                else:
                    if tokens.mask is not None:
                        hidden = repeat_last_real(hidden, tokens.mask)
                    kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-(logits_to_keep or 0), None)
                    logits = self.model.logits(hidden[:, kept])
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output.to_tuple() if return_dict is False else output

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
        self, hidden: Tensor, labels: Tensor, tokens: Tokens, logits_to_keep: int | Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The loss, and the logits unless it is computed without them."""
        if logits_to_keep is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError(f"logits_to_keep is {logits_to_keep} with labels; accepted with labels: None or 0")
        if tokens.bounds is not None:
            labels = without_first_labels(labels, tokens.bounds)
        if logits_to_keep is None and self.training and is_plain_linear(self.model.head):
            return self._loss_without_logits(hidden, labels, **kwargs), None
        logits = self.model.logits(hidden)
        return self.loss_function(
            logits=logits, labels=labels, vocab_size=self.model.config.vocab_size, **kwargs
        ), logits

    def _loss_without_logits(
        self,
        hidden: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """transformers' ForCausalLMLoss: the mean over labels, or their sum divided by num_items_in_batch."""
        if shift_labels is None:
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
        loss = self.model.mean_nats(hidden, shift_labels)
        if num_items_in_batch is None:
            return loss
        return loss * (shift_labels != IGNORED).sum() / num_items_in_batch

    @property
    def base_model(self) -> Callable[..., Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The model without its head, for losses that apply the head themselves (TRL)."""
        return partial(RetNetModel.forward, self)

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


def _refuse_unknown_outputs(kwargs: dict[str, Any]) -> None:
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.get(name):
            raise ValueError(f"{name} is {kwargs[name]}; accepted: False, as these are not returned")
