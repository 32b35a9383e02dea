"""One token of the short convolution per sequence, fused for decoding: x and the last inputs overwritten.

`ops/short_convolution.py` defines the operation. Here there are no gradients and no checks. On a GPU it is one launch
(`kernels/decode/short_convolution.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from retnet.ops import device
from retnet.ops.dtypes import widened
from retnet.ops.short_convolution import Activation


def short_convolution_step_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    recent: Tensor,
    active: Tensor | None,
    *,
    activation: Activation = "none",
) -> None:
    """Convolve one token of every sequence: x becomes y, and `recent` what the next token needs.

    Args:
        x: [S, C], overwritten; any stride of rows, contiguous channels.
        weight: [C, 1, W] with W of 2 or more; the last tap is this token's.
        bias: [C].
        recent: [S, W - 1, C] the inputs before this token, overwritten; contiguous channels.
        active: [S] bool; the others keep `recent`, and their y has no meaning. None where all are active.
        activation: after the convolution.
    """
    if device.uses_kernels(x):
        from retnet.kernels.decode.short_convolution import convolution_step_

        convolution_step_(x, weight, bias, recent, active, activation)
        return
    window = torch.cat((recent, x[:, None].to(recent.dtype)), 1)
    y = (widened(window) * widened(weight[:, 0]).T).sum(1)
    if bias is not None:
        y += bias
    if activation == "silu":
        F.silu(y, inplace=True)
    x.copy_(y)
    after = window[:, 1:]
    recent.copy_(after if active is None else torch.where(active[:, None, None], after, recent))
