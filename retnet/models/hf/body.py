"""`RetNetModel`: the language model without its head, as transformers expect one.

Left out: attention weights, which are refused if asked for.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput, logging

from retnet.layers.moe import MoE
from retnet.layers.recompute import Recompute
from retnet.models.decode.decoder import running
from retnet.models.directory import stored_config
from retnet.models.hf.cache import StateCache
from retnet.models.hf.config import RetNetConfig
from retnet.models.hf.inputs import Tokens
from retnet.models.hf.keywords import loss_keywords
from retnet.models.hf.pretrained import RetNetPreTrainedModel, drawn_seed
from retnet.models.lm import LanguageModel

logger = logging.get_logger(__name__)
Output = TypeVar("Output", bound=ModelOutput)
HiddenStates = bool | int | list[int] | None  # all, none, or those of the given places


class Body(NamedTuple):
    """What the layers return: final hidden states [B, T, D], the cache, and the hidden states of all layers."""

    hidden: Tensor
    cache: StateCache | None
    hidden_states: tuple[Tensor | None, ...] | None


class RetNetModel(RetNetPreTrainedModel):
    """The model without its head: final hidden states."""

    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: RetNetConfig, model: LanguageModel | None = None):
        """model: holds the weights, which are shared; drawn anew if None."""
        super().__init__(config)
        self._shares_weights = model is not None
        if model is None:
            core = config.core
            on_meta = torch.get_default_device().type == "meta"  # nothing is drawn, and torch's generator stays as is
            model = LanguageModel(core, seed=core.seed if on_meta else drawn_seed())
            for module in model.modules():
                module._is_hf_initialized = not on_meta  # type: ignore[assignment]
        self.model = model
        self.post_init()

    def init_weights(self) -> None:
        """As in transformers; does nothing where the weights are another model's."""
        if not self._shares_weights:
            super().init_weights()

    @classmethod
    def wrap(cls, model: LanguageModel) -> Self:
        """A wrapper of an existing model; both share the weights."""
        with torch.device("meta"):
            wrapper = cls(RetNetConfig.of(stored_config(model)))
        wrapper.model = model
        for module in model.modules():
            module._is_hf_initialized = True  # type: ignore[assignment] (`init_weights` leaves them as they are)
        return wrapper

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: HiddenStates = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Hidden states [B, T, D] after the final norm; arguments as for `RetNetForCausalLM.forward`."""
        marks = (attention_mask, position_ids, cu_seq_lens_q, seq_idx)
        tokens = self._tokens(input_ids, inputs_embeds, past_key_values, *marks)
        self._loss_keywords(kwargs, tokens, past_key_values, cu_seq_lens_q)
        if self._shares_weights and torch.is_grad_enabled():
            warn_of_losses_left_out(self.model)
        with nullcontext() if torch.compiler.is_compiling() else running(self.model):
            body = self._body(tokens, input_ids, inputs_embeds, past_key_values, use_cache, output_hidden_states)
        output = BaseModelOutputWithPast(
            last_hidden_state=body.hidden,  # type: ignore[arg-type]
            past_key_values=body.cache,
            hidden_states=body.hidden_states,  # type: ignore[arg-type]
        )
        return self._returned(output, return_dict)

    def _tokens(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        cache: StateCache | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seq_lens: Tensor | None,
        seq_idx: Tensor | None,
    ) -> Tokens:
        """The shape [B, T] of these tokens, and their mask or document boundaries."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("accepted: one of input_ids and inputs_embeds")
        if cache is not None and not isinstance(cache, StateCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}; accepted: retnet.hf.StateCache or None")
        name, dims = ("input_ids", 2) if inputs_embeds is None else ("inputs_embeds", 3)
        if not isinstance(given, Tensor) or given.dim() != dims:
            found = f"shape {list(given.shape)}" if isinstance(given, Tensor) else f"type {type(given).__name__}"
            raise ValueError(f"{name} is of {found}; accepted: a tensor {'[B, T]' if dims == 2 else '[B, T, D]'}")
        shape = (given.shape[0], given.shape[1])
        continued = cache is not None and cache.state is not None
        return Tokens.of(shape, attention_mask, position_ids, cu_seq_lens, seq_idx, continued)

    def _loss_keywords(
        self, given: dict[str, Any], tokens: Tokens, cache: StateCache | None, cu_seq_lens: Tensor | None
    ) -> dict[str, Any]:
        """The arguments of the loss among the keywords; raises for those that cannot be honoured."""
        if self.config.output_attentions:
            given = {"output_attentions": True, **given}
        return loss_keywords(self, given, tokens.shape[1], cache, cu_seq_lens) if given else {}

    def _body(
        self,
        tokens: Tokens,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        cache: StateCache | None,
        use_cache: bool | None,
        output_hidden_states: HiddenStates = None,
        losses: list[Tensor] | None = None,
    ) -> Body:
        """Run the layers. The returned cache is the given one, or a new one."""
        packed = tokens.bounds is not None
        if use_cache is None:
            unasked = self.model.training or packed or not self._keeps_state or not self.config.use_cache
            use_cache = cache is not None or not unasked
        if use_cache and packed:
            raise ValueError("use_cache is True for packed documents; accepted: False, as their states are not kept")
        if packed:
            input_ids = None if input_ids is None else input_ids.reshape(1, -1)
            inputs_embeds = None if inputs_embeds is None else inputs_embeds.flatten(0, 1)[None]
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        asked = not (output_hidden_states is None or output_hidden_states is False)  # 0 is a place
        inner: list[Tensor] | None = [] if asked else None
        hidden, state = self.model.hidden(
            input_ids,
            None if cache is None else cache.state,
            embeddings=inputs_embeds,
            mask=tokens.mask,
            cu_seqlens=tokens.bounds,
            carry=use_cache,
            in_place=use_cache and cache is not None and not torch.is_grad_enabled(),
            losses=losses,
            inner=inner,
        )
        if state is not None:
            cache = StateCache() if cache is None else cache
            cache.update_state(state, tokens.shape[1])
        hidden = hidden.view(*tokens.shape, hidden.shape[-1])
        hidden_states = None
        if inner is not None:
            if getattr(self.config, "tie_last_hidden_states", None) is not False:
                inner[-1] = hidden
            rows = [x if x.shape == hidden.shape else x.view_as(hidden) for x in inner]  # the graph's own tensors
            hidden_states = _selected(rows, output_hidden_states)
        return Body(hidden, cache if use_cache else None, hidden_states)

    def _returned(self, output: Output, return_dict: bool | None) -> Output | tuple:
        """The output in the form that the call or the configuration asks for."""
        chosen = self.config.return_dict if return_dict is None else return_dict
        return output.to_tuple() if chosen is False else output

    @property
    def _keeps_state(self) -> bool:
        return all(layer.keeps_state for layer in self.model.config.layers)

    @property
    def base_model(self) -> RetNetModel:
        return self

    @property
    def gradient_checkpointing(self) -> bool:
        """Set by transformers, after it has stored the function to use in `_gradient_checkpointing_func`."""
        return self.model.recompute.level == "layer"

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.model.recompute = replace(self.model.recompute, level="layer") if enable else Recompute()
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


def warn_of_losses_left_out(model: LanguageModel) -> None:
    """Say once what a loss computed outside a model lacks in training: the losses of its routers and of multi-token
    prediction."""
    if not model.training or torch.compiler.is_compiling():
        return
    own = {
        "of routers, unless it adds the output's aux_loss": any(isinstance(module, MoE) for module in model.modules()),
        "of multi-token prediction, which needs labels": model.mtp is not None,
    }
    lacking = " and ".join(name for name, has in own.items() if has)
    if lacking:
        logger.warning_once(
            "The loss is computed outside the model (label smoothing, compute_loss_func, or TRL's head of its own), so "
            f"it lacks the losses {lacking}."
        )


def _selected(states: list[Tensor], places: HiddenStates) -> tuple[Tensor | None, ...]:
    """All hidden states, or those of the given places, which may be negative; None elsewhere."""
    if isinstance(places, bool) or places is None:
        return tuple(states)
    wanted = {places} if isinstance(places, int) else set(places)
    count = len(states)
    return tuple(x if i in wanted or i - count in wanted else None for i, x in enumerate(states))
