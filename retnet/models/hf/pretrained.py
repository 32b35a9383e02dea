"""`RetNetPreTrainedModel`: loading and initial weights, shared by all models with a `RetNetConfig`."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from retnet.layers.mixers import float32_parameters
from retnet.models.hf.config import RetNetConfig
from retnet.models.hf.tensor_parallel import TP_PLAN, finish_split, whole_state_dict
from retnet.models.lm import LanguageModel


class RetNetPreTrainedModel(PreTrainedModel):
    """What all models with a `RetNetConfig` share, also those of a user: loading, and initial weights."""

    config_class = RetNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # what attention layers use; other mixers have no choice of implementations
    _is_stateful = True  # no token can be removed, as assisted generation would need
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers types it so)
    _keep_in_fp32_modules_strict = float32_parameters()
    _tp_plan = TP_PLAN

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; with tensor parallelism (`distributed_config`) each process keeps its own heads."""
        loaded = super().from_pretrained(*args, **kwargs)
        finish_split(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def init_parallel_plans(self) -> None:
        """As in transformers, whose plans may not name a parameter twice: a tied head is the embedding."""
        super().init_parallel_plans()
        if self.config.tie_word_embeddings and self._tp_plan is not None:
            self._tp_plan.pop("model.head", None)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in transformers. A split model is saved whole, by all processes together."""
        if getattr(self.model, "shard", None) is not None and kwargs.get("state_dict") is None:
            kwargs["state_dict"] = whole_state_dict(self)
        super().save_pretrained(save_directory, *args, **kwargs)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """As in transformers, but not skipping a `LanguageModel`, which has no parameters of its own."""
        if isinstance(module, LanguageModel) and not getattr(module, "_is_hf_initialized", False):
            self._init_weights(module)
            module._is_hf_initialized = True  # type: ignore[assignment]
        else:
            super()._initialize_weights(module, is_custom_code)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the parameters of a `LanguageModel` that no checkpoint gave, by its rules, from torch's generator.

        Modules inside it are left to it, because their distribution depends on their place. Others, such as the head of
        a classifier, are drawn as in transformers: N(0, initializer_range).
        """
        if isinstance(module, LanguageModel):
            _draw_missing(module)
        elif not any(module in model.modules() for model in self.modules() if isinstance(model, LanguageModel)):
            super()._init_weights(module)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Does nothing: the configuration's `auto_map` names a shim instead of a copy of this file."""


def drawn_seed() -> int:
    """A seed from torch's global generator, which `torch.manual_seed` and transformers' `set_seed` set."""
    return int(torch.randint(2**62, (), device="cpu"))


@torch.no_grad()
def _draw_missing(model: LanguageModel) -> None:
    """Draw the parameters and buffers that no checkpoint gave; transformers marks those that one did."""
    missing = {
        name: weight
        for name, weight in (*model.named_parameters(), *model.named_buffers())
        if not (weight.is_meta or getattr(weight, "_is_hf_initialized", False))
    }
    if missing:
        fresh = LanguageModel(model.config, seed=drawn_seed()).state_dict()
        for name, weight in missing.items():
            weight.copy_(fresh[name])
