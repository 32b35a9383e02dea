"""Weight-only int8 through torchao: half the memory and traffic of bfloat16 weights, a quarter of float32.

Each row of a weight is rounded to 127 steps (torchao's Int8WeightOnlyConfig); activations and states keep their
precision. torchao defines and stores the weights, and multiplies them wherever a module runs, as in prefill. The fused
decode step reads the same tensors in its own product; on a CPU that rounds inputs to bfloat16. Embeddings, norms,
routers and the projection of gated decays are not quantised: they are small, and the error of a decay grows with the
context. The maps from latents to keys and values are not either: decoding absorbs their weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retnet.layers.latent_attention import LatentAttention
from retnet.models.lm import LanguageModel
from retnet.system.extras import needs

KEPT = ("decay_proj", "router")  # names of modules that are not quantised


def quantize_int8_(model: LanguageModel) -> LanguageModel:
    """Quantise the model's linear layers in place, the head included (an embedding tied to it keeps its dtype).

    Raises MissingExtra without the extra `quantize`.
    """
    with needs("quantize", "int8"):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_  # pyright: ignore[reportMissingImports]

    layers = [module for module in model.modules() if isinstance(module, LatentAttention)]
    absorbed = {proj for layer in layers for proj in (layer.k_proj, layer.v_proj)}

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] not in KEPT and module not in absorbed

    quantize_(model, Int8WeightOnlyConfig(), filter_fn=chosen)
    return model


def int8_parts(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """(values [N, K] int8, scale [N]) of a weight that torchao quantised by rows; None for any other."""
    values, scale = getattr(weight, "qdata", None), getattr(weight, "scale", None)
    if not isinstance(values, Tensor) or not isinstance(scale, Tensor) or values.dtype != torch.int8:
        return None
    return (values, scale.flatten()) if values.dim() == 2 and scale.numel() == len(values) else None


def move_int8_(weight: Tensor, values: Tensor) -> None:
    """Let a quantised weight read its values [N, K] from other memory that holds the same numbers."""
    weight.qdata = values  # type: ignore[attr-defined] (torchao's tensor)
