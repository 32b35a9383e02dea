"""`RetNetConfig`: a transformers config that wraps `ModelConfig`."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedConfig

from retnet.models.config import ModelConfig
from retnet.models.config_json import TOKEN_IDS, merged, outer_fields
from retnet.models.directory import AUTO_MAP, MODEL_TYPE, write_shim
from retnet.models.hf.tensor_parallel import TP_PLAN
from retnet.models.presets import preset

DEFAULT_PRESET = "retnet-125m"


class RetNetConfig(PreTrainedConfig):
    """Carries a `ModelConfig` as plain data, with the usual names of transformers beside it.

    model_config: `ModelConfig.to_dict()`; the preset retnet-125m if None.
    use_cache: whether a call of the model returns its states, unless the call says otherwise.
    loss_without_logits: in training with labels, compute the loss without holding the logits of all tokens in memory;
    the output then has no logits.
    vocab_size, hidden_size, num_hidden_layers, tie_word_embeddings, initializer_range, dtype, bos_token_id,
    eos_token_id (one id or a list) and pad_token_id change what model_config says, when given or set later.
    num_attention_heads is that of the first mixer with heads; it can only be read.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers types it so)
    base_model_tp_plan = TP_PLAN

    model_config: dict | None = None
    use_cache: bool = True
    loss_without_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.model_config is None:  # transformers instantiates configuration classes without arguments
            self.model_config = preset(DEFAULT_PRESET).to_dict()
        given = {name: x for name, x in kwargs.items() if x is not None}
        for name, value in outer_fields(merged(self.model_config, {**given, "dtype": self.dtype})).items():
            setattr(self, name, value)
            kwargs.pop(name, None)
        self.auto_map = dict(AUTO_MAP)
        super().__post_init__(**kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        """As in transformers; a new `model_config` also sets the fields beside it."""
        super().__setattr__(key, value)
        if key == "model_config" and "num_hidden_layers" in vars(self):
            for name, x in outer_fields(merged(value, {})).items():
                super().__setattr__(name, x)

    @classmethod
    def of(cls, config: ModelConfig, **options: Any) -> RetNetConfig:
        """The transformers config of a core configuration; options are further fields, such as num_labels."""
        return cls(model_config=config.to_dict(), **options)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, from what `to_dict` returns or config.json holds.

        Raises ValueError for a configuration of another library's RetNet, which has the same model_type.
        """
        if "model_config" not in config_dict:
            raise ValueError(
                "this config.json has no model_config: its model was not saved by retnet. `retnet convert SOURCE OUT` "
                "converts RetNets of flash-linear-attention, syncdoth and torchscale"
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def core(self) -> ModelConfig:
        """The wrapped configuration, with what stands beside it.

        Raises ValueError that names a wrong key or value.
        """
        without_ids: dict[str, Any] = {**(self.model_config or {}), **dict.fromkeys(TOKEN_IDS)}
        return merged(without_ids, vars(self))

    # What losses that apply the head themselves (TRL's) look for.
    @property
    def logit_scale(self) -> float:
        return self.core.logit_scale

    @property
    def final_logit_softcapping(self) -> float | None:
        return self.core.logit_soft_cap

    def to_dict(self) -> dict[str, Any]:
        """As transformers does; `model_config` and the fields beside it say the same."""
        core = self.core
        return super().to_dict() | outer_fields(core) | {"model_config": core.to_dict()}

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Does nothing: `auto_map` is always set, and names a shim instead of a copy of this file."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write config.json, and the shim that other processes load the directory with."""
        os.makedirs(save_directory, exist_ok=True)
        write_shim(save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
