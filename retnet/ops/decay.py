"""The decay of retention: schedules, windows, and products of decays between two tokens.

Everything here is computed in float32 or wider from the configuration and never stored: in bfloat16 every decay above
1 - 2^-8 would round to 1. A decay is kept as its natural logarithm, so that a product over tokens is a sum and no
power of 1/gamma is ever formed.
"""

import math

import torch
from torch import Tensor

# exp() of anything below this is 0 even in float64. Such a log decay is a hard reset: it empties the state. Resets are
# counted instead of summed, since one -1e4 (or -inf) in a running sum would erase the digits of its neighbours.
RESET_BELOW = -750.0


def paper_log_decay(num_heads: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """log gamma [H] of Eq. 8 of the paper: gamma_h = 1 - 2^-(5 + h), h = 0 .. H - 1. All published weights use it."""
    h = torch.arange(num_heads, dtype=torch.float64, device="cpu")
    return torch.log1p(-torch.exp2(-5.0 - h)).to(dtype)


def experiment_log_decay(num_heads: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """log gamma [H] of the paper's experiments (section 3.1): gamma = 1 - exp(linspace(ln 1/32, ln 1/512, H))."""
    exponent = torch.linspace(math.log(1 / 32), math.log(1 / 512), num_heads, dtype=torch.float64, device="cpu")
    return torch.log1p(-torch.exp(exponent)).to(dtype)


def alibi_log_decay(
    num_heads: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = "cpu"
) -> Tensor:
    """log gamma [H] of lightning attention (arXiv 2401.04658): the slopes of ALiBi (arXiv 2108.12409), negated.

    -2^(-8/H), -2^(-16/H), ... if H is a power of 2. Otherwise the slopes of the next lower power, then every other one
    of the next higher power, as in the authors' code. Computed on the device: a captured step may not copy from the
    host.
    """
    below = 2 ** math.floor(math.log2(num_heads))
    heads = torch.arange(num_heads, dtype=torch.float64, device=device)
    return -torch.exp2(-8 / below * torch.where(heads < below, heads + 1, heads - below + 0.5)).to(dtype)


SCHEDULES = {"paper": paper_log_decay, "experiment": experiment_log_decay, "alibi": alibi_log_decay}


def window(log_decay: float, floor: float = 0.01) -> float:
    """Tokens until a contribution, decayed by `log_decay` per token, is below `floor` of itself; inf for no decay."""
    if log_decay == 0:
        return math.inf
    return max(1.0, math.ceil(math.log(floor) / log_decay))


def decay_norm(log_decay: Tensor, n: Tensor) -> Tensor:
    """sqrt(sum(gamma^i, i = 0 .. n)): the paper's normalisation of row n of the decay mask (section 2.1, step 2).

    log_decay [H], n [...] (0 for a sequence's first token) -> [..., H] in log_decay's dtype. The geometric sum is taken
    in closed form through expm1, exact also where gamma is 1 (the sum is n + 1) or 0 (the sum is 1).
    """
    count = (n + 1).to(log_decay.dtype)[..., None]
    safe = torch.where(log_decay == 0, torch.full_like(log_decay, -1.0), log_decay)
    total = torch.where(log_decay == 0, count, torch.expm1(count * safe) / torch.expm1(safe))
    return total.sqrt()


def running_log_decay(log_decay: Tensor, mask: Tensor | None, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Running sums of the log decay over T tokens: (total, resets), each [B or 1, T, H].

    `total` (float64) sums the finite log decays up to and including each token, `resets` counts the hard resets. A
    token whose mask is False adds nothing. With a fixed decay [H] the sum is a count of tokens times the decay.
    """
    is_reset = log_decay < RESET_BELOW
    finite = torch.where(is_reset, torch.zeros_like(log_decay), log_decay).double()
    if log_decay.dim() == 1:
        if mask is None:
            count = torch.arange(1, num_tokens + 1, device=log_decay.device)[None, :, None]
        else:
            count = mask.long().cumsum(1)[..., None]
        return count * finite, count * is_reset
    if mask is not None:
        finite = finite * mask[..., None]
        is_reset = is_reset & mask[..., None]
    return finite.cumsum(1), is_reset.long().cumsum(1)


def pairwise_decay(total: Tensor, resets: Tensor | None, dtype: torch.dtype = torch.float64) -> Tensor:
    """D[t, s] = product of the decays of tokens s < i <= t, 0 for s > t: [B or 1, T, H] twice -> [B or 1, H, T, T].

    resets None: there are none. Exponents are differences in float64; exp() and the result are of `dtype`.
    """
    t_first, s_first = total.transpose(1, 2)[..., :, None], total.transpose(1, 2)[..., None, :]
    apart = torch.ones(total.shape[1], total.shape[1], dtype=torch.bool, device=total.device).triu(1)
    if resets is not None:
        apart = apart | (resets.transpose(1, 2)[..., :, None] != resets.transpose(1, 2)[..., None, :])
    # Masked before exp: above the diagonal the exponent is positive and may overflow.
    return torch.exp((t_first - s_first).to(dtype).masked_fill(apart, -math.inf))


def decay_from_start(total: Tensor, resets: Tensor) -> Tensor:
    """Product of the decays from the first token through each one, [B or 1, T, H]: the factor of an earlier state."""
    return torch.exp(total.masked_fill(resets > 0, -math.inf))


def decay_to_end(total: Tensor, resets: Tensor) -> Tensor:
    """Product of the decays after each token through the last one, [B or 1, T, H]: the factor of a write at the end."""
    return torch.exp((total[:, -1:] - total).masked_fill(resets != resets[:, -1:], -math.inf))
