"""`ModelConfig`: the complete description of a model, made by presets, stacks and converters."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from retnet.layers.block import BlockConfig
from retnet.layers.multi_token import MultiTokenConfig
from retnet.layers.norm import check_eps
from retnet.models.strict_json import from_dict, to_dict
from retnet.system.choices import check_choices

MAX_LAYERS = 10_000
Dtype = Literal["float32", "float16", "bfloat16", "float64"]


@dataclass(frozen=True)
class ModelConfig:
    """A language model: embedding, `layers`, final norm, head.

    tie_embeddings: the head is the embedding. embedding_scale multiplies embeddings, embedding_norm comes after it.
    logit_scale multiplies logits, and logit_soft_cap c comes after it: c tanh(x / c).
    init: a row of `retnet.models.init.INIT`. mup_base_width: width of the model whose learning rates are to hold here,
    by the rules of `retnet.models.mup`; its `with_mup` sets this field and the scales that go with it. None: no rules.
    gradient_checkpointing recomputes blocks in the backward.
    float32_norms: the weights of norms and of MoE routers stay in float32, whatever `dtype` is.
    eos_token_id: the token that ends a text, or several that each do.
    mtp: modules that predict further tokens, for training and for drafts (`layers/multi_token.py`); None: none.
    source: the text of the stack file that it was compiled from; ignored when configurations are compared.
    """

    vocab_size: int
    d_model: int
    layers: tuple[BlockConfig, ...]
    name: str = "retnet"
    tie_embeddings: bool = True
    embedding_scale: float = 1.0
    embedding_norm: Literal["layer", "rms", "none"] = "none"
    final_norm: Literal["layer", "rms", "none"] = "layer"
    norm_eps: float = 1e-6
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None
    init: Literal["paper", "torchscale", "normal"] = "paper"
    init_std: float = 0.02
    mup_base_width: int | None = None
    seed: int = 0
    dtype: Dtype = "float32"
    float32_norms: bool = False
    gradient_checkpointing: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    mtp: MultiTokenConfig | None = None
    source: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("vocab_size", "d_model"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: a positive integer")
        check_eps(self, "norm_eps")
        if not 0 <= self.init_std < math.inf:
            raise ValueError(f"init_std is {self.init_std}; accepted: a number of at least 0")
        if self.mup_base_width is not None and self.mup_base_width < 1:
            raise ValueError(f"mup_base_width is {self.mup_base_width}; accepted: a positive integer, or None")
        if not self.layers:
            raise ValueError("layers is empty; accepted: at least one")
        if self.logit_soft_cap is not None and not self.logit_soft_cap > 0:
            raise ValueError(f"logit_soft_cap is {self.logit_soft_cap}; accepted: a positive number or None")
        if not 0 < self.logit_scale < math.inf:
            raise ValueError(f"logit_scale is {self.logit_scale}; accepted: a positive number")
        if self.eos_token_id == ():
            raise ValueError("eos_token_id is empty; accepted: a token id, several, or None")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            tokens = self.eos_token_ids if name == "eos_token_id" else (getattr(self, name),)
            if any(token is not None and not 0 <= token < self.vocab_size for token in tokens):
                given = getattr(self, name)
                raise ValueError(f"{name} is {given}; accepted: 0 to {self.vocab_size - 1} (vocab_size - 1)")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text: none, one or several."""
        ids = self.eos_token_id
        return () if ids is None else (ids,) if isinstance(ids, int) else ids

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON. Equal layers in a row are written once, with `repeat`."""
        data = {f.name: to_dict(getattr(self, f.name)) for f in fields(self) if f.name != "layers"}
        runs: list[dict[str, Any]] = []
        for layer in self.layers:
            if runs and runs[-1]["layer"] == layer:
                runs[-1]["repeat"] += 1
            else:
                runs.append({"repeat": 1, "layer": layer})
        return data | {"layers": [{"repeat": run["repeat"], "layer": to_dict(run["layer"])} for run in runs]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`. Raises ValueError naming the path of an unknown key or a wrong value."""
        if not isinstance(data, Mapping):
            raise ValueError(f"config: expected a mapping of ModelConfig, got {type(data).__name__}")
        runs = data.get("layers")
        if not isinstance(runs, list):
            raise ValueError(f"config.layers: expected a list of {{repeat, layer}}, got {type(runs).__name__}")
        layers: list[BlockConfig] = []
        for i, run in enumerate(runs):
            one = from_dict(_Run, run, f"config.layers[{i}]")
            if len(layers) + one.repeat > MAX_LAYERS:
                raise ValueError(f"config.layers: more than {MAX_LAYERS} layers; accepted: 1 to {MAX_LAYERS}")
            layers.extend([one.layer] * one.repeat)
        return from_dict(cls, {**data, "layers": layers})


@dataclass(frozen=True)
class _Run:
    layer: BlockConfig
    repeat: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.repeat <= MAX_LAYERS:
            raise ValueError(f"repeat is {self.repeat}; accepted: 1 to {MAX_LAYERS}")
