"""One chunk of retention on the CPU: its decays, its buffers, the running state, and products that all passes share.

`cpu_chunkwise` has the equations and runs these over the chunks of a sequence.
"""

from functools import cached_property

import torch
from torch import Tensor

from retnet.ops.decay import decay_from_start, decay_to_end, pairwise_decay, running_log_decay

# A fixed decay near 1, rounded to float32 and applied a thousand times, is off by a thousand roundings to one side.
# So one chunk in this many also corrects the accumulated rounding errors of the others.
MAKE_UP_EVERY = 16

# Smallest decay of a whole chunk whose D is formed as an outer product: its smallest entries are the square of this,
# still normal numbers, and a factor common to a row or a column costs no digits.
FACTOR_ABOVE = 1e-17


class ChunkDecay:
    """Decays of one chunk of C tokens for [B or 1] sequences; those that lead to an output carry the scale of q.

    factored: D is the outer product of vectors that `from_start` and `to_end` have already been multiplied into.
    from_start: scale * a      [B or 1, G, heads of a group, C, 1]
    to_end: b                  [B or 1, G, heads of a group, C, 1]
    whole: decay(chunk)        [B or 1, H, 1, 1]
    make_up: decay(chunk), corrected by the rounding errors of `whole` since the last correction
    """

    def __init__(self, log_decay: Tensor, C: int, G: int, scale: float, dtype: torch.dtype, may_factor: bool):
        self._total, resets = running_log_decay(log_decay, None, C)
        self._resets = resets if resets.any() else None
        self._scale, self._grouped = scale, lambda x: x.to(dtype).unflatten(1, (G, -1))
        from_start = decay_from_start(self._total, resets).transpose(1, 2)[..., None]
        to_end = decay_to_end(self._total, resets).transpose(1, 2)[..., None]
        self._exact = from_start[:, :, -1:]
        self.factored = may_factor and bool((self._exact > FACTOR_ABOVE).all())
        self.from_start, self.to_end = self._grouped(from_start * scale), self._grouped(to_end)
        self.whole = self.make_up = self._exact.to(dtype)
        if log_decay.dim() == 1:
            missed = (MAKE_UP_EVERY - 1) * (self._exact.log() - self.whole.double().log())
            self.make_up = torch.where(self._exact > 0.5, self._exact * missed.exp(), self._exact).to(dtype)

    @cached_property
    def inside(self) -> Tensor:
        """The factors of the scores of vectors from `load_q` and `load_k`: [B or 1, G, heads of a group, C, C]."""
        if self.factored:
            C = self._total.shape[1]
            return self._grouped(self._exact.reciprocal() * self._exact.new_ones(C, C).tril())
        return self._grouped(pairwise_decay(self._total, self._resets, self.whole.dtype).mul_(self._scale))


class RunningState:
    """S or dS of one pass, advanced in place chunk after chunk: `value` [B H, K, V], `heads` [B, H, K, V] its view."""

    def __init__(self, heads: Tensor, steps: int = 0):
        self.heads, self.value, self.steps = heads, heads.flatten(0, 1), steps
        self.transposed = self.value.transpose(1, 2)

    def advance(self, decay: ChunkDecay, keys: "Vectors", values: "Vectors") -> None:
        """S <- decay(chunk) S + (b K)^T V, or dS <- decay(chunk) dS + (scale a Q)^T dO, in place."""
        self.steps += 1
        self.heads.mul_(decay.whole if self.steps % MAKE_UP_EVERY else decay.make_up)
        self.value.baddbmm_(keys.transposed, values.flat)

    def clone(self) -> "RunningState":
        return RunningState(self.heads.clone(), self.steps)


class Vectors:
    """A buffer with one vector per head and token of a chunk, in the shapes that products and broadcasts take.

    flat [B heads, C, D] and its `transposed`, heads [B, heads, C, D], groups [B, G, heads of a group, C, D].
    """

    def __init__(self, flat: Tensor, B: int, G: int, heads: int):
        self.flat, self.transposed = flat, flat.transpose(1, 2)
        self.heads = flat.view(B, heads, *flat.shape[1:])
        self.groups = flat.view(B, G, heads // G, *flat.shape[1:])

    def load(self, part: Tensor) -> "Vectors":
        self.heads.copy_(part)
        return self


class Scratch:
    """The buffers of a pass for chunks of C tokens, and the steps that forward and backward share.

    `memory` holds the bytes behind them, reused for every chunk and sequence.
    """

    def __init__(self, B: int, G: int, H: int, C: int, K: int, V: int, dtype: torch.dtype, memory: dict[str, Tensor]):
        self.B, self.G, self.H = B, G, H

        def buffer(name: str, heads: int, columns: int) -> Vectors:
            size = B * heads * C * columns
            if name not in memory or memory[name].numel() < size:
                memory[name] = torch.empty(size, dtype=dtype)
            return Vectors(memory[name][:size].view(B * heads, C, columns), B, G, heads)

        self.q, self.k, self.raw_scores = buffer("q", G, K), buffer("k", G, K), buffer("raw scores", G, C)
        self.q_decayed, self.k_decayed, self.across = (buffer(x, H, K) for x in ("q decayed", "k decayed", "across"))
        self.v, self.dout, self.out = (buffer(name, H, V) for name in ("v", "dout", "out"))
        self.scores, self.dscores = buffer("scores", H, C), buffer("dscores", H, C)

    def load_q(self, part: Tensor, decay: ChunkDecay) -> Vectors:
        """Vectors of q [B, G, C, K] as `decayed_scores` takes them; also fills `q_decayed` with scale a Q."""
        return _load_decayed(part, self.q, self.q_decayed, decay.from_start, decay.factored)

    def load_k(self, part: Tensor, decay: ChunkDecay) -> Vectors:
        """Vectors of k [B, G, C, K] as `decayed_scores` takes them; also fills `k_decayed` with b K."""
        return _load_decayed(part, self.k, self.k_decayed, decay.to_end, decay.factored)

    def decayed_scores(self, q: Vectors, k: Vectors, decay: ChunkDecay) -> Vectors:
        """scale * Q K^T * D of loaded vectors: [B H, C, C]."""
        torch.bmm(q.flat, k.transposed, out=self.raw_scores.flat)
        torch.mul(self.raw_scores.groups, decay.inside, out=self.scores.groups)
        return self.scores

    def decayed_dscores(self, decay: ChunkDecay) -> Vectors:
        """scale * dO V^T * D, the gradient of Q K^T (if factored: of the decayed vectors' scores): [B H, C, C]."""
        torch.bmm(self.dout.flat, self.v.transposed, out=self.dscores.flat)
        self.dscores.groups.mul_(decay.inside)
        return self.dscores

    def sum_group(self, x: Tensor) -> Tensor:
        """Add up the heads that share q and k: [B H, C, D] -> [B G, C, D]."""
        if self.G == self.H:
            return x
        return x.view(self.B * self.G, self.H // self.G, *x.shape[1:]).sum(1)

    def read_state(self, x: Vectors, state: RunningState, decay: Tensor, factored: bool) -> None:
        """across = x state^T, and decayed unless factored: [B H, C, K]."""
        torch.bmm(x.flat, state.transposed, out=self.across.flat)
        if not factored:
            self.across.groups.mul_(decay)

    def store_gradient(self, part: Tensor, dscores: Tensor, x: Vectors, decay: Tensor, factored: bool) -> None:
        """Write dq or dk: `across` from other chunks plus the part of the scores; all decayed if factored."""
        gradient = self.sum_group(self.across.flat).baddbmm_(self.sum_group(dscores), x.flat)
        gradient = gradient.view(self.B, self.G, *gradient.shape[1:])
        if factored:
            torch.mul(gradient, decay[:, :, 0], out=part)
        else:
            part.copy_(gradient)


def _load_decayed(part: Tensor, plain: Vectors, decayed: Vectors, decay: Tensor, factored: bool) -> Vectors:
    if factored:
        torch.mul(part.unsqueeze(2), decay, out=decayed.groups)
        return decayed
    torch.mul(plain.load(part).groups, decay, out=decayed.groups)
    return plain
