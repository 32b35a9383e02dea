"""`RetNetConfig`: a transformers config that wraps `ModelConfig`."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedConfig

from retnet.models.config import ModelConfig
from retnet.models.config_json import TOKEN_IDS, merged, outer_fields
from retnet.models.directory import AUTO_MAP, MODEL_TYPE, write_shim
from retnet.models.presets import preset

DEFAULT_PRESET = "retnet-125m"


class RetNetConfig(PreTrainedConfig):
    """Carries a `ModelConfig` as plain data; Hugging Face's usual names are read from it.

    model_config: `ModelConfig.to_dict()`; the preset retnet-125m if None. Token ids given beside it override its own.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers types it so)

    model_config: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.model_config is None:  # transformers instantiates configuration classes without arguments
            self.model_config = preset(DEFAULT_PRESET).to_dict()
        for name, value in outer_fields(self.core).items():
            if getattr(self, name, None) is None:
                setattr(self, name, value)
        self.auto_map = dict(AUTO_MAP)
        super().__post_init__(**kwargs)

    @classmethod
    def of(cls, config: ModelConfig) -> RetNetConfig:
        """The transformers config of a core configuration."""
        return cls(model_config=config.to_dict())

    @property
    def core(self) -> ModelConfig:
        """The wrapped configuration, with the token ids and the dtype that stand beside it.

        Raises ValueError that names a wrong key or value.
        """
        outer = {name: getattr(self, name, None) for name in (*TOKEN_IDS, "dtype")}
        return merged(self.model_config or {}, outer)

    @property
    def vocab_size(self) -> int:
        return self.core.vocab_size

    @vocab_size.setter
    def vocab_size(self, size: int) -> None:
        self.model_config = {**(self.model_config or {}), "vocab_size": size}

    @property
    def hidden_size(self) -> int:
        return self.core.d_model

    @property
    def num_hidden_layers(self) -> int:
        return len(self.core.layers)

    @property
    def tie_word_embeddings(self) -> bool:
        return self.core.tie_embeddings

    @property
    def final_logit_softcapping(self) -> float | None:
        return self.core.logit_soft_cap

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing: `auto_map` is always set, and names a shim instead of a copy of this file."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config.json, and the shim that other processes load the directory with."""
        os.makedirs(save_directory, exist_ok=True)
        write_shim(save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
