"""One step of the recurrence on the CPU: S <- exp(log_decay) S + k^T v (Eq. 6 of the paper), in place."""

from dataclasses import dataclass

from torch import Tensor

# Log decays above this are slow: they subtract, S + expm1(log_decay) S. exp(log_decay) itself would be rounded to the
# same side at every token, and thousands of tokens add that up. The kernels' `decay_parts` has the same threshold.
SLOW_ABOVE = -0.5


@dataclass(frozen=True)
class StepDecay:
    """Decays of one token: log_decay [H] or [B, H], natural log, <= 0, float32 (float64).

    change: expm1(log_decay) where it was computed in advance. all_slow: whether all are known to be slow.
    """

    log_decay: Tensor
    change: Tensor | None = None
    all_slow: bool = False

    @classmethod
    def fixed(cls, log_decay: Tensor) -> "StepDecay":
        """Decays that never change: what can be known about them is computed once."""
        log_decay = log_decay.detach().clone()
        change = log_decay.double().expm1().to(log_decay.dtype)
        return cls(log_decay, change, bool((log_decay > SLOW_ABOVE).all()))

    def masked(self, absent: Tensor) -> "StepDecay":
        """No decay where absent [B or 1, 1] is True."""
        size = (absent.shape[0], -1)
        change = None if self.change is None else self.change.expand(size).masked_fill(absent, 0)
        return StepDecay(self.log_decay.expand(size).masked_fill(absent, 0), change, self.all_slow)


def advance_(S: Tensor, decay: StepDecay, k: Tensor, v: Tensor) -> Tensor:
    """S [B, H, K, V] <- exp(log_decay) S + k^T v, in place, with k [B, H, K] and v [B, H, V] in the state's dtype."""
    change = decay.log_decay.expm1() if decay.change is None else decay.change
    if not decay.all_slow:
        slow = decay.log_decay > SLOW_ABOVE
        S.mul_(decay.log_decay.masked_fill(slow, 0).exp()[..., None, None])
        change = change.masked_fill(~slow, 0)
    return S.addcmul_(S, change[..., None, None]).addcmul_(k[..., None], v[..., None, :])
