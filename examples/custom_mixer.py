"""A mixer of your own in a language model: a moving average per channel. Run it: python examples/custom_mixer.py

The model continues a prompt. Its weights are random, so the text is too.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

import retnet
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.mixer_base import MixerConfig, MixerFlops, MixerModule
from retnet.layers.mixers import Mixer, register
from retnet.layers.retention import RetentionConfig
from retnet.layers.state import LayerState, no_tokens


@dataclass(frozen=True)
class MeanConfig(MixerConfig):
    half_life: float  # tokens
    kind: Literal["mean"] = "mean"


@dataclass
class MeanState(LayerState):
    mean: Tensor  # [N, 1, 1, D]


class Mean(MixerModule):
    """m_t = a m_{t-1} + (1 - a) x_t        y_t = (sigmoid(x_t W_g) * m_t) W_out        a = 2^(-1 / half_life)"""

    WEIGHT_ROLES: ClassVar = {"gate": "value", "out": "output"}  # for initialisation and Muon

    def __init__(self, config, d_model):
        super().__init__()
        self.gate, self.out = nn.Linear(d_model, d_model, bias=False), nn.Linear(d_model, d_model, bias=False)
        self.log_decay = -math.log(2) / config.half_life

    def init_state(self, batch, device, dtype, num_tokens=0):
        return MeanState(no_tokens(batch, device), torch.zeros(batch, 1, 1, self.out.in_features, device=device))

    def forward(self, x, state, layout):  # the mean is retention with one head and q = k = 1
        one, log_decay = x.new_ones(*x.shape[:2], 1, 1), torch.tensor([self.log_decay], device=x.device)
        options = {"scale": -math.expm1(self.log_decay), "mask": layout.mask, "cu_seqlens": layout.cu_seqlens}
        y, mean = retnet.retention(one, one, x[:, :, None], log_decay, state=state and state.mean, **options)
        y = self.out(torch.sigmoid(self.gate(x)) * y[:, :, 0])
        return y, MeanState.after(state, layout, mean=mean) if layout.carry else None


register(Mixer("mean", MeanConfig, Mean, MeanState, None, lambda config, work: MixerFlops(*[3 * work.d_model] * 2)))

if __name__ == "__main__":
    mixers = MeanConfig(half_life=8), RetentionConfig(num_heads=2, key_dim=64, value_dim=128), MeanConfig(half_life=64)
    layers = tuple(BlockConfig(mixer, FeedForwardConfig(hidden_dim=128)) for mixer in mixers)
    model = retnet.LanguageModel(retnet.ModelConfig(257, 64, layers, bos_token_id=256)).eval()
    print(repr(retnet.generate(model, "import ", max_tokens=20, seed=0)))
