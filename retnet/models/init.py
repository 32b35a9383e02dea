"""Initial weights: the role that a weight plays (`retnet.layers.weight_roles`) decides its distribution.

"paper": the paper initialises like DeepNet (arXiv 2203.00555): Xavier, with values, gates, outputs and feed-forward
scaled by (8 L)^(-1/4). "torchscale": the gains of the official code, 2^-2.5 for q, k, v and gate and 2^-1 for the
output. "normal": N(0, init_std). Under the last two, projections that write to the residual stream are scaled by
(2 L)^(-1/2), so that its size does not grow with depth.

Embeddings are small against what the layers add: with a tied head, a final hidden state that still points along its own
token's embedding would predict that token again with a logit of about sqrt(D), and a wide model would start tens of
nats above ln(vocab).

Under muP (`retnet.models.mup`) the distribution is that of the base width, times a power of the widths' ratio.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from retnet.layers.moe import ExpertLinear
from retnet.layers.weight_roles import WeightRole, named_roles
from retnet.models.config import ModelConfig
from retnet.models.mup import RULES, Part, check_growths, growths, width_ratio

# role -> gain of a Xavier-uniform weight, as a function of the number of layers L
Gain = Callable[[int], float]
_DEEPNET: Gain = lambda L: (8 * L) ** -0.25  # noqa: E731
INIT: dict[str, dict[WeightRole, Gain]] = {
    "paper": {
        "query_key": lambda L: 1.0,
        "value": _DEEPNET,
        "output": _DEEPNET,
        "feed_forward": _DEEPNET,
        "down": _DEEPNET,
        "other": lambda L: 1.0,
    },
    "torchscale": {
        "query_key": lambda L: 2**-2.5,
        "value": lambda L: 2**-2.5,
        "output": lambda L: 2**-1 * (2 * L) ** -0.5,
        "feed_forward": lambda L: 3**-0.5,
        "down": lambda L: (3 * 2 * L) ** -0.5,
        "other": lambda L: 1.0,
    },
}


def initialize(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Draw every weight of `model` anew from `seed`, whatever torch's global generator holds."""
    device = next(model.parameters()).device
    generator = torch.Generator(device if device.type != "meta" else "cpu").manual_seed(seed)
    roles, kinds = named_roles(model), {}
    if config.mup_base_width is not None:
        check_growths(model)
        kinds = {id(weight): parts for weight, parts in growths(model).items()}
    for module in model.modules():
        role, parts = roles.get(module, "other"), kinds.get(id(getattr(module, "weight", None)), ())
        if isinstance(module, (nn.Linear, nn.Embedding)):
            _initialize_weight(module.weight, role, parts, config, generator)
        elif isinstance(module, ExpertLinear) and device.type != "meta":  # there any number of experts costs nothing
            for weight in module.get_parameter("weight").unbind(0):
                _initialize_weight(weight, role, parts, config, generator)
        if isinstance(module, (nn.Linear, ExpertLinear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
    if device.type != "meta":
        for module in model.modules():
            reset = getattr(module, "reset_own", None)  # what has a rule of its own: decays, convolutions
            if reset is not None:
                reset(generator)


def _initialize_weight(
    weight: Tensor, role: WeightRole, parts: tuple[Part, ...], config: ModelConfig, generator: torch.Generator
) -> None:
    if weight.is_meta:
        return
    L = sum(layer.mixer.depth for layer in config.layers)
    if role == "embedding":
        width = config.mup_base_width or config.d_model
        nn.init.normal_(weight, std=min(config.init_std, 0.5 * width**-0.5), generator=generator)
    elif config.init == "normal":
        depth = math.sqrt(2 * L) if role in ("output", "down") else 1.0
        nn.init.normal_(weight, std=config.init_std / depth, generator=generator)
    else:
        gain = INIT[config.init][role](L) * _gain_at_base(weight, parts, width_ratio(config))
        nn.init.xavier_uniform_(weight, gain=gain, generator=generator)
    if parts:
        for rows, part in zip(weight.detach().split([part.rows for part in parts]), parts, strict=True):
            rows.mul_(width_ratio(config) ** RULES[part.growth].init)


def _gain_at_base(weight: Tensor, parts: tuple[Part, ...], ratio: float) -> float:
    """Xavier's deviation of this weight at the base width, divided by that at its own."""
    kinds = {part.growth for part in parts}
    outputs, inputs = weight.shape
    base_inputs = inputs / ratio if kinds & {"hidden", "readout"} else inputs
    base_outputs = outputs / ratio if kinds & {"hidden", "input"} else outputs
    return math.sqrt((inputs + outputs) / (base_inputs + base_outputs))
