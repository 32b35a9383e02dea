"""Cross-entropy of a linear head without the logits of all tokens: [R, vocab] is computed and used in slices.

The forward pass computes the gradient as well: the logits of a slice are overwritten by their gradient before the next
slice. Each element is written three times (logit, float32 log-probability, gradient), sums are float32, and nothing
waits for a GPU. Ignored labels are masked in the narrow operands of the two products, never in [R, vocab].

`linear_cross_entropy` of torch exists from 2.13 on, and older versions are supported; that of liger-kernel needs CUDA.
benchmarks/bench_loss.py measures them side by side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from retnet.ops.derivatives import needs_plain_form, plain_gradients
from retnet.ops.dtypes import wide_dtype

# Float32 log-probabilities in memory at a time. Each slice reads and writes all of the weight's gradient, which a GPU
# notices below some thousand rows.
SLICE_BYTES = 64 << 20
SLICE_BYTES_GPU = 512 << 20


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, soft_cap: float | None, dtype: torch.dtype
    ) -> Tensor:
        given = hidden, weight, labels  # saved for second derivatives; saving casts would hold a copy of the weight
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        rows = slice_rows(hidden, weight.shape[0])
        wide = wide_dtype(hidden.dtype)
        real = labels != -100
        count = real.sum().clamp_min(1)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=wide, device=hidden.device)
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        for begin in range(0, len(labels), rows):
            part = slice(begin, begin + rows)
            ignored = ~real[part]
            h = hidden[part].masked_fill(ignored[:, None], 0)
            logits, log_p, slope = log_probabilities(h, weight, soft_cap, wide)
            target = labels[part].clamp_min(0)[:, None]
            log_p_target = log_p.gather(1, target)
            total -= log_p_target[:, 0].masked_fill(ignored, 0).sum()
            if need_hidden or need_weight:
                dlogits = _logit_gradient(logits, log_p, log_p_target, target, slope)
                if dhidden is not None:
                    torch.mm(dlogits, weight, out=dhidden[part])
                    dhidden[part].masked_fill_(ignored[:, None], 0)
                if dweight is not None:
                    add_product(dweight, dlogits.T, h)
        # Divided by the count only in the backward: beside a loss scale, float16 would underflow here.
        dweight = None if dweight is None else dweight.to(dtype)
        ctx.save_for_backward(dhidden, dweight, count, *given)
        ctx.soft_cap, ctx.dtype = soft_cap, dtype
        return total / count

    @staticmethod
    def backward(ctx, dloss: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        *gradients, count, hidden, weight, labels = ctx.saved_tensors
        if torch.is_grad_enabled() or needs_plain_form(dloss):

            def plain(hidden: Tensor, weight: Tensor) -> tuple[Tensor]:
                return (_plain_cross_entropy(hidden, weight, labels, ctx.soft_cap, ctx.dtype),)

            gradients = plain_gradients(plain, (hidden, weight), ctx.needs_input_grad[:2], (dloss,))
        else:
            gradients = [None if g is None else g * (dloss / count).to(g.dtype) for g in gradients]
        return *gradients, None, None, None


def slice_rows(hidden: Tensor, vocab_size: int) -> int:
    """Rows of logits [R, vocab] in memory at a time."""
    return max(1, (SLICE_BYTES_GPU if hidden.is_cuda else SLICE_BYTES) // (4 * max(1, vocab_size)))


def _plain_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, soft_cap: float | None, dtype: torch.dtype
) -> Tensor:
    """The same loss with all logits in memory, differentiable by autograd."""
    wide, ignored = wide_dtype(dtype), labels == -100
    logits = F.linear(hidden.to(dtype).masked_fill(ignored[:, None], 0), weight.to(dtype)).to(wide)
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    nats = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return nats / (~ignored).sum().clamp_min(1)


def log_probabilities(
    hidden: Tensor, weight: Tensor, soft_cap: float | None, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits [R, vocab], their log-softmax in the wide dtype, and with a soft cap its slope at the logits."""
    logits = F.linear(hidden, weight)
    if soft_cap is None:
        return logits, logits.log_softmax(-1, dtype=wide), None
    capped = torch.tanh(logits.to(wide) / soft_cap)
    return logits, (soft_cap * capped).log_softmax(-1), 1 - capped.square_()


def _logit_gradient(
    logits: Tensor, log_p: Tensor, log_p_target: Tensor, target: Tensor, slope: Tensor | None
) -> Tensor:
    """softmax - onehot, written over the logits; the targets' p - 1 is exact however near p is to 1."""
    at_target = log_p_target.expm1()
    if slope is not None:
        return logits.copy_(log_p.exp_().scatter_(1, target, at_target).mul_(slope))
    return torch.exp(log_p, out=logits).scatter_(1, target, at_target.to(logits.dtype))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in one call where they are of one dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, soft_cap: float | None = None) -> Tensor:
    """Mean nats of labels [...] under softmax(hidden W^T), soft-capped at c if given; a label of -100 is ignored.

    hidden [..., D] and weight [vocab, D] of one dtype. 0 where every label is ignored.
    """
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    arguments = hidden.flatten(0, -2), weight, labels.flatten(), soft_cap, dtype
    if needs_plain_form(hidden, weight):
        return _plain_cross_entropy(*arguments)
    return _LinearCrossEntropy.apply(*arguments)
