"""`RetNetPreTrainedModel`: loading and initial weights, shared by all models with a `RetNetConfig`."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from retnet.layers.mixers import float32_parameters
from retnet.models.hf.config import RetNetConfig
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
    """Draw the parameters that no checkpoint gave; transformers marks those that one did."""
    missing = {
        name: weight
        for name, weight in model.named_parameters()
        if not (weight.is_meta or getattr(weight, "_is_hf_initialized", False))
    }
    if missing:
        fresh = LanguageModel(model.config, seed=drawn_seed())
        for name, weight in missing.items():
            weight.copy_(fresh.get_parameter(name))
