"""Balance of experts without a loss: each step of training moves the routing biases against the load of the step.

    b_e <- b_e - rate sign(c_e - mean(c))     where |c_e - mean(c)| > tolerance mean(c)

c_e is how often tokens chose expert e since the last update, on all processes and in all micro-batches (Loss-Free
Balancing, arXiv 2408.15664). The bias enters the choice of experts alone, and no gradient. It is fixed in evaluation.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from retnet.layers.moe import MoE


@torch.no_grad()
def update_routing_biases(model: nn.Module, processes: dist.ProcessGroup | None = None) -> Tensor | None:
    """Move the biases of every mixture of experts in `model`: to be called after each step of the optimizer.

    processes: those that hold copies of the model, or shards of it, and trained on other rows; their loads are added,
    so that their biases stay equal. All of them call this together. Returns the largest load of an expert divided by
    the mean load of its layer, over all layers: a scalar tensor, 1 at balance; None in a model without such biases.
    """
    layers = [module for module in model.modules() if isinstance(module, MoE) and module.routing_bias is not None]
    if not layers:
        return None
    loads = [layer.take_load() for layer in layers]
    if processes is not None:
        joined = torch.cat(loads)
        dist.all_reduce(joined, group=processes)
        loads = joined.split([len(load) for load in loads])
    peaks = []
    for layer, load in zip(layers, loads, strict=True):
        rate, tolerance = layer.config.bias_update_rate, layer.config.bias_tolerance
        mean = load.double().mean()
        excess = load - mean
        step = torch.where(excess.abs() > tolerance * mean, excess.sign(), 0)
        layer.routing_bias -= rate * step.to(layer.routing_bias.dtype)
        peaks.append(load.max() / mean.clamp_min(1e-9))
    return torch.stack(peaks).max()
