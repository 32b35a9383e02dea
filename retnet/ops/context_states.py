"""States of a shard from its tokens alone: what an exchange sends before the shard's output is computed.

    S = sum_t exp(decay from t to the end) k_t^T v_t            dC = scale sum_t exp(decay up to t) q_t^T dout_t

S is the final state of tokens that start from zeros, dC the gradient of the state before them. Each is one matrix
product over the tokens per head: 2 K V operations per token, where the output takes 4 K V or more.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from retnet.ops.dtypes import wide_dtype

CHUNK = 256  # tokens whose log decays are summed one after another


class Decays:
    """Sums of log decays over the tokens of a part of a shard.

    log_decay [H] or [B, T, H] and mask [B, T] or None are those of the part. A masked token does not decay.
    """

    def __init__(self, log_decay: Tensor, num_tokens: int, mask: Tensor | None):
        self._fixed = log_decay if log_decay.dim() == 1 else None
        if self._fixed is not None:
            places = torch.arange(1, num_tokens + 1, device=log_decay.device)[None]
            self._upto = places if mask is None else mask.cumsum(1)
        else:
            masked = log_decay if mask is None else log_decay.masked_fill(~mask[..., None], 0)
            self._each = masked
            self._upto = _running_sum(masked)

    def upto(self) -> Tensor:
        """The sum up to each token, its own included: [B, T, H], where B may be 1 for all rows."""
        return self._upto if self._fixed is None else self._times(self._upto)

    def after(self) -> Tensor:
        """The sum over the tokens after each token; a difference of sums would lose digits, and -inf - -inf is NaN."""
        if self._fixed is not None:
            return self._times(self._upto[:, -1:] - self._upto)
        later = _running_sum(self._each.flip(1)).flip(1)
        return torch.cat([later[:, 1:], torch.zeros_like(later[:, :1])], 1)

    def total(self) -> Tensor:
        """The sum over all tokens [B, H, 1, 1]."""
        end = self._upto[:, -1:] if self._fixed is None else self._times(self._upto[:, -1:])
        return end[:, 0, :, None, None]

    def _times(self, counts: Tensor) -> Tensor:
        """Log decays of so many tokens [B, T, H]; 0 for no token, also where a decay is -inf."""
        assert self._fixed is not None
        return (counts[..., None] * self._fixed).masked_fill((counts == 0)[..., None], 0)


def _running_sum(x: Tensor) -> Tensor:
    """Cumulative sums over the tokens of x [B, T, H], first inside chunks: a GPU sums one row token by token."""
    T = x.shape[1]
    chunks = -(-T // CHUNK)
    padded = F.pad(x.mT, (0, chunks * CHUNK - T)).unflatten(-1, (chunks, CHUNK))
    inside = padded.cumsum(-1)
    before = F.pad(inside[..., -1].cumsum(-1), (1, -1))
    return (inside + before[..., None]).flatten(-2)[..., :T].mT


def weighted(x: Tensor, exponents: Tensor, scale: float = 1.0) -> Tensor:
    """x [B, T, G, K] times scale exp(exponents [B, T, H]): [B, T, H, K] in x's dtype, rounded once."""
    weights = exponents.exp()[..., None] * scale
    heads = weights.shape[2] // x.shape[2]
    if heads > 1:
        x, weights = x[:, :, :, None], weights.unflatten(2, (-1, heads))
    shape = torch.broadcast_shapes(x.shape, weights.shape)
    out = torch.mul(x, weights, out=torch.empty(shape, dtype=x.dtype, device=x.device))
    return out.flatten(2, 3) if heads > 1 else out


def weighted_state(x: Tensor, y: Tensor, exponents: Tensor, scale: float = 1.0) -> Tensor:
    """scale sum_t exp(exponents_t) x_t^T y_t of x [B, T, G, K], y [B, T, H, V]: [B, H, K, V], float32 or wider.

    Where heads share x, the weights multiply y, and nothing is repeated in memory.
    """
    (B, _, G, K), (H, V) = x.shape, y.shape[2:]
    if G == H and K <= V:
        x = weighted(x, exponents, scale)
    else:
        y = weighted(y, exponents, scale)
    left = x.permute(0, 2, 3, 1).flatten(0, 1)  # [B G, K, T]
    right = y.unflatten(2, (G, H // G)).flatten(3).transpose(1, 2).flatten(0, 1)  # [B G, T, H / G V]
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        state = torch.bmm(left, right, out_dtype=torch.float32)
    else:
        wide = wide_dtype(left.dtype)
        state = torch.bmm(left.to(wide), right.to(wide))
    return state.view(B, G, K, H // G, V).transpose(2, 3).flatten(1, 2)
