"""Grouped linear layers for a mixture of experts: each group of tokens is multiplied by the matrix of its expert."""

import torch
import torch.nn.functional as F
from torch import Tensor

from retnet.ops.derivatives import transforms_active


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    """x [R, I] W_e^T + bias_e [R, O], with weight [E, O, I] and bias [E, O].

    The tokens of x are sorted by expert: the first counts[0] are of expert 0, and so on. In bfloat16 on CUDA this is
    one grouped matrix product, which does not wait for the counts [E]; elsewhere one product per expert.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if _has_grouped_product(x, weight):
        ends = counts.cumsum(0).to(torch.int32)
        out = torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)
        if bias is None:
            return out
        expert = torch.searchsorted(ends, torch.arange(len(x), device=x.device, dtype=torch.int32), right=True)
        return out + bias[expert]
    if transforms_active():
        return _masked_linear(x, weight, bias, counts)
    biases = [None] * len(weight) if bias is None else bias.unbind(0)
    groups = zip(x.split(counts.tolist()), weight.unbind(0), biases)
    return torch.cat([F.linear(rows, matrix, b) for rows, matrix, b in groups])


def _masked_linear(x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    """Every expert on every token, and a mask: under `torch.func.vmap`, no shape may depend on the counts."""
    ends, tokens = counts.cumsum(0), torch.arange(len(x), device=x.device)
    own = (tokens < ends[:, None]) & (tokens >= (ends - counts)[:, None])
    biases = [None] * len(weight) if bias is None else bias.unbind(0)
    parts = (F.linear(x, matrix, b) for matrix, b in zip(weight.unbind(0), biases))
    return torch.stack([part.where(mask[:, None], 0) for part, mask in zip(parts, own.unbind(0))]).sum(0)


def _has_grouped_product(x: Tensor, weight: Tensor) -> bool:
    """The grouped product takes bfloat16 operands on a GPU, with rows that are multiples of 16 bytes."""
    return x.is_cuda and x.dtype == weight.dtype == torch.bfloat16 and weight.shape[1] % 8 == weight.shape[2] % 8 == 0
