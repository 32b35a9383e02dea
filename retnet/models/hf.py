"""The Hugging Face face of the language model: configuration and model classes for Trainer, save and load.

Thin on purpose: everything that computes is `LanguageModel`. Here are only names and conventions: labels are not
shifted, packed documents are told by position_ids that restart at 0, and loss kwargs go to transformers' own loss.
Left out: caches and `generate`, for which use `retnet.models.generation`; registration with the Auto classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from retnet.models.config import ModelConfig
from retnet.models.directory import MODEL_TYPE
from retnet.models.lm import LanguageModel
from retnet.models.presets import preset

IGNORED = -100
DEFAULT_PRESET = "retnet-125m"


class RetNetConfig(PreTrainedConfig):
    """Carries a `ModelConfig` as plain data; Hugging Face's usual names are read from it.

    model_config: `ModelConfig.to_dict()`; that of the preset retnet-125m if None.
    """

    model_type = MODEL_TYPE

    model_config: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.model_config is None:  # transformers makes one of every configuration class without arguments
            self.model_config = preset(DEFAULT_PRESET).to_dict()
        core = self.core
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (
            core.bos_token_id,
            core.eos_token_id,
            core.pad_token_id,
        )
        self.dtype = self.dtype or core.dtype
        super().__post_init__(**kwargs)

    @classmethod
    def of(cls, config: ModelConfig) -> RetNetConfig:
        """The face of a core configuration."""
        return cls(model_config=config.to_dict())

    @property
    def core(self) -> ModelConfig:
        """The configuration that it carries. Raises ValueError naming what is wrong in it."""
        return ModelConfig.from_dict(self.model_config or {})

    @property
    def vocab_size(self) -> int:
        return self.core.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.core.d_model

    @property
    def num_hidden_layers(self) -> int:
        return len(self.core.layers)

    @property
    def tie_word_embeddings(self) -> bool:
        return self.core.tie_embeddings


class RetNetForCausalLM(PreTrainedModel):
    """A language model with a loss, for Trainer and for save and load."""

    config_class = RetNetConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers types it so)
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: RetNetConfig):
        super().__init__(config)
        self.model = LanguageModel(config.core)
        self.post_init()

    @classmethod
    def wrap(cls, model: LanguageModel) -> RetNetForCausalLM:
        """The face of a model that exists; they share their weights."""
        with torch.device("meta"):
            face = cls(RetNetConfig.of(model.config))
        face.model = model
        return face

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: `LanguageModel` has drawn its weights from its own table and seed."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_submodule("embedding", value)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.set_submodule("head", new_embeddings)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Logits and, with labels, the loss.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 0 or False at pads.
            position_ids: [B, T]; where they restart at 0, a new document begins with a fresh state. Without restarts
                inside a row they change nothing, as positions count real tokens.
            labels: [B, T], as input_ids, not shifted; -100 is ignored, and so is the first token of a document.
            kwargs: for transformers' loss (num_items_in_batch).

        Raises ValueError for pads together with packed documents.
        """
        bounds = None if position_ids is None else document_bounds(position_ids)
        if bounds is None or len(bounds) == len(input_ids) + 1:  # one document a row
            mask = None if attention_mask is None else attention_mask.bool()
            output = self.model(input_ids, mask=mask)
            logits = output.logits
        else:
            if attention_mask is not None and not bool(attention_mask.all()):
                raise ValueError("pads together with packed documents (position_ids that restart) are not supported")
            output = self.model(input_ids.reshape(1, -1), cu_seqlens=bounds)
            logits = output.logits.view(*input_ids.shape, -1)
            if labels is not None:
                labels = labels.masked_fill(position_ids == 0, IGNORED)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if output.auxiliary_loss is not None:
                loss = loss + output.auxiliary_loss
        return CausalLMOutput(loss=loss, logits=logits)


def document_bounds(position_ids: Tensor) -> Tensor:
    """cu_seqlens [N + 1] of rows [B, T] laid end to end, from positions that restart at 0; a row is always a bound.

    Raises ValueError if a row does not begin at 0.
    """
    starts = position_ids.flatten() == 0
    if not bool((position_ids[:, 0] == 0).all()):
        raise ValueError(f"position_ids start at {position_ids[:, 0].tolist()}; packed rows start at 0")
    bounds = starts.nonzero().flatten()
    return torch.cat([bounds, bounds.new_tensor([position_ids.numel()])])
