"""Causal convolution with filters as long as the sequence, by the fast Fourier transform: O(T log T) work.

    y_t = sum_{s <= t} filter_{t - s} x_s

Signals are padded with zeros to at least twice their length, so that nothing wraps around: an output depends on earlier
inputs alone, and (up to rounding) not on the length of the sequence. There is no state of fixed size: decoding reads
all past inputs.
"""

import torch
from torch import Tensor


def long_convolution(x: Tensor, filters: Tensor) -> Tensor:
    """x [B, T, D] convolved with filters [L, D], L >= T: y [B, T, D] in the filters' dtype (float32 or wider)."""
    num_tokens, x, filters = x.shape[1], x.to(filters.dtype), filters[: x.shape[1]]
    if num_tokens <= 1 or len(x) == 0:  # libraries of Fourier transforms refuse to transform nothing
        return x * filters
    return _convolve(x, filters[None], num_tokens)


def past_convolution(past: Tensor, position: Tensor, filters: Tensor, num_tokens: int) -> Tensor:
    """The part of the next tokens' outputs that comes from earlier inputs.

    past [N, C, D] holds the first position [N] inputs of each sequence; filters [L, D], L >= C + num_tokens.
    Returns [N, num_tokens, D] in the filters' dtype.
    """
    N, C, D = past.shape
    slots = torch.arange(C, device=past.device)
    held = (slots < position[:, None])[..., None]
    if num_tokens == 1:
        lags = (position[:, None] - slots).clamp_min(0)
        return torch.where(held, filters[lags] * past, 0).sum(1, keepdim=True)
    if 0 in (N, C, num_tokens):
        return filters.new_zeros(N, num_tokens, D)
    total = C + num_tokens
    whole = _convolve(torch.where(held, past.to(filters.dtype), 0), filters[None, :total], total)
    next_ones = position[:, None] + torch.arange(num_tokens, device=past.device)
    return whole.gather(1, next_ones[..., None].expand(-1, -1, D))


def _convolve(x: Tensor, filters: Tensor, num_outputs: int) -> Tensor:
    """The first outputs of the full convolution along dimension 1."""
    size = _fast_size(x.shape[1] + filters.shape[1])
    spectrum = torch.fft.rfft(x, size, dim=1) * torch.fft.rfft(filters, size, dim=1)
    return torch.fft.irfft(spectrum, size, dim=1)[:, :num_outputs]


def _fast_size(size: int) -> int:
    """The smallest 2^a, 3 * 2^a or 5 * 2^a that is at least `size`."""
    return min(odd << max(0, -(-size // odd) - 1).bit_length() for odd in (1, 3, 5))
