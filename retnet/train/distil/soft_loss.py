"""Kullback-Leibler divergence of two linear heads, without the logits of all tokens: computed and used in slices.

As `retnet.models.loss` does for cross-entropy, the forward pass computes the gradient as well. With p the teacher's
probabilities, s the student's and y the label, the loss of a token and its gradient by the student's logits are

    a KL(p || s) - b log s_y            a (s - p) + b (s - onehot(y))
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from retnet.models.loss import add_product, log_probabilities, slice_rows
from retnet.ops.dtypes import wide_dtype


@dataclass(frozen=True)
class SoftTargets:
    """Of the teacher: hidden states [R, D] as its head takes them (`LanguageModel.before_head`), the weight of its head
    [vocab, D], and its soft cap."""

    hidden: Tensor
    weight: Tensor
    soft_cap: float | None


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        soft_cap: float | None,
        targets: SoftTargets,
        weights: tuple[float, float],
        dtype: torch.dtype,
    ) -> Tensor:
        given, (of_divergence, of_labels) = (hidden.dtype, weight.dtype), weights
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        soft, soft_weight = targets.hidden.to(dtype), targets.weight.to(dtype)
        wide, real = wide_dtype(dtype), labels != -100
        count = real.sum().clamp_min(1)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        # Two distributions are in memory, where cross-entropy has one.
        rows = max(1, slice_rows(hidden, weight.shape[0]) // 2)
        for begin in range(0, len(labels), rows):
            part = slice(begin, begin + rows)
            ignored = ~real[part]
            h = hidden[part].masked_fill(ignored[:, None], 0)
            _, log_s, slope = log_probabilities(h, weight, soft_cap, wide)
            _, log_p, _ = log_probabilities(soft[part], soft_weight, targets.soft_cap, wide)
            p, target = log_p.exp(), labels[part].clamp_min(0)[:, None]
            loss = of_divergence * (p * (log_p - log_s)).sum(1) - of_labels * log_s.gather(1, target)[:, 0]
            total += loss.masked_fill(ignored, 0).sum()
            if dhidden is None and dweight is None:
                continue
            dlogits = log_s.exp_().mul_(of_divergence + of_labels).sub_(p.mul_(of_divergence))
            if of_labels:
                dlogits.scatter_add_(1, target, torch.full_like(target, -of_labels, dtype=wide))
            dlogits = (dlogits if slope is None else dlogits.mul_(slope)).to(dtype)
            if dhidden is not None:
                torch.mm(dlogits, weight, out=dhidden[part])
                dhidden[part].masked_fill_(ignored[:, None], 0)
            if dweight is not None:
                add_product(dweight, dlogits.T, h)
        ctx.save_for_backward(dhidden, dweight, count)
        ctx.given = given
        return total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        dhidden, dweight, count = ctx.saved_tensors
        scaled = [
            None if g is None else (g * (dloss / count).to(g.dtype)).to(kind)
            for g, kind in zip((dhidden, dweight), ctx.given, strict=True)
        ]
        return *scaled, None, None, None, None, None


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    soft_cap: float | None,
    targets: SoftTargets,
    *,
    of_divergence: float = 1.0,
    of_labels: float = 0.0,
) -> Tensor:
    """Mean nats per token of KL(teacher || student), times `of_divergence`, plus `of_labels` times the cross-entropy.

    hidden [..., D], as its head takes them, and weight [vocab, D] are the student's; labels [...], where -100 leaves a
    token out of both terms.
    0 where every label is -100. There is no gradient for the teacher.
    """
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    flat = SoftTargets(targets.hidden.detach().flatten(0, -2), targets.weight.detach(), targets.soft_cap)
    weights = (of_divergence, of_labels)
    return _LinearDivergence.apply(hidden.flatten(0, -2), weight, labels.flatten(), soft_cap, flat, weights, dtype)
