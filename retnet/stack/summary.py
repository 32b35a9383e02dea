"""Summaries of a stack's layers, for tables and pictures: parameters, reach, and a description in words.

The reach of a head is how many tokens back it can use: its window, all tokens, or, for retention with a fixed decay,
the distance at which its decay falls below 1%. Gated retention and Mamba have no known reach: they decide from the
input what to forget.
"""

from dataclasses import dataclass, replace

import torch

from retnet.layers.block import Block, BlockConfig
from retnet.models.config import ModelConfig
from retnet.models.cost import idle_parameters

from .layers import Layer, one_per_entry
from .load import Stack


@dataclass(frozen=True)
class LayerSummary:
    """One layer.

    idle_parameters: those of the feed-forward that a token does not use, in experts that were not chosen for it.
    reach: of each head, in tokens; None without a limit that is known (`reach_depends_on_input` of the mixer).
    mixer, feed_forward: descriptions in words.
    """

    layer: Layer
    config: BlockConfig
    mixer_parameters: int
    feed_forward_parameters: int
    idle_parameters: int
    reach: tuple[float, ...] | None
    mixer: str
    feed_forward: str


def summarize(stack: Stack, config: ModelConfig) -> list[LayerSummary]:
    """Every layer of a stack built as `config`."""
    sizes: dict[BlockConfig, tuple[int, int]] = {}
    by_entry: dict[int, LayerSummary] = {}
    for layer in one_per_entry(stack.layers):
        block = config.layers[layer.index]
        if block not in sizes:
            sizes[block] = _parameters(block, config.d_model)
        one = ModelConfig(config.vocab_size, config.d_model, (block,))
        words = layer.mixer.words(layer.mixer_type), feed_forward_words(layer, stack)
        idle = idle_parameters(one)
        by_entry[layer.entry] = LayerSummary(layer, block, *sizes[block], idle, layer.mixer.reach(one), *words)
    return [replace(by_entry[layer.entry], layer=layer) for layer in stack.layers]


def runs(rows: list[LayerSummary]) -> list[tuple[int, LayerSummary]]:
    """Each run of equal layers, as its length and its first layer."""
    found: list[tuple[int, LayerSummary]] = []
    for row in rows:
        if found and found[-1][1].config == row.config and found[-1][1].layer.template == row.layer.template:
            found[-1] = (found[-1][0] + 1, found[-1][1])
        else:
            found.append((1, row))
    return found


def _parameters(block: BlockConfig, d_model: int) -> tuple[int, int]:
    with torch.device("meta"):
        module = Block(block, d_model)
    names = ((name, p.numel()) for name, p in module.named_parameters())
    mixer = sum(size for name, size in names if name.startswith("mixer") and ".feed_forward" not in name)
    return mixer, sum(p.numel() for p in module.parameters()) - mixer


def feed_forward_words(layer: Layer, stack: Stack) -> str:
    """'SwiGLU 8192', 'MLP (gelu) 512', '2 of 8 experts, SwiGLU 4096'."""
    if layer.ffn is None:
        return ", ".join(dict.fromkeys(feed_forward_words(inner, stack) for inner in layer.streams))
    width = stack.spec.model.d_model * stack.spec.model.mlp_ratio
    gated = layer.ffn.type == "gated_mlp" or layer.activation == "swiglu"
    names = {"swiglu": "SwiGLU", "gelu": "GeGLU", "relu": "ReGLU"}
    words = f"{names[layer.activation] if gated else f'MLP ({layer.activation})'} {width}"
    moe = layer.ffn.moe
    return words if moe is None else f"{moe.words()}, {words}"
