"""Cross-entropy of a linear head without the logits of all tokens: [R, vocab] is made and used a slice at a time.

The gradient of the loss needs nothing that the forward did not just compute, so each slice's logits turn into their own
gradient in place and are gone before the next slice. Sums are float32. (torch's own `linear_cross_entropy` appears in
2.13, newer than what we support; liger-kernel's is for CUDA alone.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SLICE_BYTES = 256 << 20  # float32 logits in memory at a time


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, soft_cap: float | None) -> Tensor:
        rows = max(1, SLICE_BYTES // (4 * weight.shape[0]))
        wide = torch.promote_types(hidden.dtype, torch.float32)
        count = (labels != -100).sum().clamp_min(1)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=wide, device=hidden.device)
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        for begin in range(0, len(labels), rows):
            part = slice(begin, begin + rows)
            h, y = hidden[part], labels[part]
            logits, capped = _logits(h, weight, soft_cap, wide)
            total += F.cross_entropy(logits, y, ignore_index=-100, reduction="sum")
            if not (need_hidden or need_weight):
                continue
            dlogits = logits.sub_(logits.logsumexp(-1, keepdim=True)).exp_()
            dlogits[torch.arange(len(y), device=y.device), y.clamp_min(0)] -= 1
            dlogits *= (y != -100)[:, None]
            if capped is not None:
                dlogits *= 1 - capped.square_()
            dlogits = dlogits.to(hidden.dtype)
            if dhidden is not None:
                torch.mm(dlogits, weight, out=dhidden[part])
            if dweight is not None:
                dweight += dlogits.T @ h
        # Divided by the count only in the backward: beside a loss scale, float16 would underflow here.
        ctx.save_for_backward(dhidden, None if dweight is None else dweight.to(weight.dtype), count)
        return total / count

    @staticmethod
    def backward(ctx, dloss: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        *gradients, count = ctx.saved_tensors
        return *(None if g is None else g * (dloss / count).to(g.dtype) for g in gradients), None, None


def _logits(hidden: Tensor, weight: Tensor, soft_cap: float | None, wide: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Logits [R, vocab] and, with a soft cap, tanh(x / c), whose square the gradient needs."""
    logits = F.linear(hidden, weight).to(wide)
    if soft_cap is None:
        return logits, None
    capped = torch.tanh(logits / soft_cap)
    return soft_cap * capped, capped


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, soft_cap: float | None = None) -> Tensor:
    """Mean nats of labels [...] under softmax(hidden W^T), soft-capped at c if given; a label of -100 is ignored.

    hidden [..., D] and weight [vocab, D] of one dtype. 0 where every label is ignored.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, labels.flatten(), soft_cap)
