"""One step of the recurrence in a kernel: S <- exp(log_decay) S + k^T v (paper Eq. 6) on a tile of a head's state."""

import triton
import triton.language as tl

from retnet.kernels.decay import decay_parts


@triton.jit
def advance(S, log_decay, kt, vt):
    """S [BK, BV], in float32, after a token with key kt [BK] and value vt [BV].

    Slow decays subtract, S + expm1(log_decay) S: exp(log_decay) itself would be rounded to the same side at every
    token, and thousands of tokens add that up.
    """
    factor, rest = decay_parts(log_decay)
    S = S.to(tl.float32)
    return S * factor + (S * rest + kt[:, None] * vt[None, :])
