"""Linear maps of groups of rows, each group by its own matrix: what a mixture of experts spends its time in."""

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    """Rows x [R, I], the first counts[0] of them for expert 0 and so on, times weight [E, O, I], plus bias [E, O].

    One grouped matrix product in bfloat16 on CUDA, which does not wait for the counts [E]; elsewhere one product an
    expert on its contiguous rows.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if _one_kernel(x, weight):
        ends = counts.cumsum(0).to(torch.int32)
        out = torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)
        if bias is None:
            return out
        expert = torch.searchsorted(ends, torch.arange(len(x), device=x.device, dtype=torch.int32), right=True)
        return out + bias[expert]
    biases = [None] * len(weight) if bias is None else bias.unbind(0)
    groups = zip(x.split(counts.tolist()), weight.unbind(0), biases)
    return torch.cat([F.linear(rows, matrix, b) for rows, matrix, b in groups])


def _one_kernel(x: Tensor, weight: Tensor) -> bool:
    """Its operands are bfloat16 with rows that are multiples of 16 bytes."""
    return x.is_cuda and x.dtype == weight.dtype == torch.bfloat16 and weight.shape[1] % 8 == weight.shape[2] % 8 == 0
