"""Training with the products of linear layers in float8, through torchao.

Both operands of a product, in the forward and in the backward, are rounded to 8 bits (arXiv 2209.05433) after a scaling
by their largest value: of the whole tensor (`tensorwise`), or of each row (`rowwise`: slower, closer to bfloat16).
Weights, their updates and the results of products keep their precision, and so does a saved model. The head, decays,
routers and experts are not changed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from retnet.models.lm import LanguageModel
from retnet.system.extras import needs

Float8 = Literal["tensorwise", "rowwise"]

STEP = 16  # the sizes of a float8 product are multiples of it
CAPABILITY = (8, 9)  # of the first GPUs with float8 products


def check_float8(scaling: Float8, bf16: bool, tokens: int) -> None:
    """Raise ValueError for a run without float8 products: without bf16, or with other numbers of tokens per process and
    step, which the gradients of weights sum over.
    """
    if not bf16:
        raise ValueError(f"float8 is {scaling!r} without bf16; accepted: bf16=true, in which all else is computed")
    if tokens % STEP:
        raise ValueError(
            f"float8 is {scaling!r} with {tokens:,} tokens per step of a process (length times "
            f"per_device_train_batch_size, divided by context_parallel); accepted: a multiple of {STEP}"
        )


def float8_layers(model: LanguageModel) -> dict[str, nn.Linear]:
    """The layers of a model whose products may be in float8, by name: plain linear layers of blocks with sizes that are
    multiples of 16, except those that compute decays.
    """
    return {
        name: layer
        for name, layer in model.layers.named_modules(prefix="layers")
        if type(layer) is nn.Linear
        and layer.in_features % STEP == 0
        and layer.out_features % STEP == 0
        and not name.endswith("decay_proj")
    }


def use_float8(model: LanguageModel, scaling: Float8, device: torch.device) -> None:
    """Put torchao's layers in place of `float8_layers`. Blocks are compiled after this.

    On a CPU the rounded operands are multiplied in their wider precision, which is slower than without float8.

    Raises ValueError if the device or the model has no float8 products, MissingExtra without torchao.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"float8 is {scaling!r} on {name}; accepted: a GPU of compute capability 8.9 or later")
    wanted = set(float8_layers(model))
    if not wanted:
        raise ValueError(
            f"float8 is {scaling!r}; accepted: a model whose linear layers have sizes in multiples of {STEP}"
        )
    with needs("quantize", f"float8={scaling}"):
        from torchao.float8 import (  # pyright: ignore[reportMissingImports]
            Float8LinearConfig,
            convert_to_float8_training,
        )
    config = replace(Float8LinearConfig.from_recipe_name(scaling), emulate=device.type != "cuda")
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in wanted)
