"""Chunkwise retention on the CPU: Eq. 7 of the paper streamed through reused buffers, with its own backward.

For every chunk of C tokens, with D the decay inside the chunk, a the decay from its start and b the decay to its end:

    out = (Q K^T * D) V + a Q S            S <- decay(chunk) S + (b K)^T V

The adjoint of retention is retention. The backward makes two walks, each with one [K, V] state per head: forward over S
for dQ, and in reverse over dS for dK and dV. Nothing of the forward is kept, so memory beyond the gradients is a few
chunks. Only the gradient of the decay needs S and dS together; S is then checkpointed every sqrt(T / C) chunks and
recomputed a segment at a time.

Where a fixed decay keeps all of a chunk above `FACTOR_ABOVE`, D is an outer product, D[t, s] = a_t b_s / decay(chunk)
for s <= t, and the rows a Q and b K that the state needs serve for the scores too: each is made in the one pass that
loads it, and the gradients of Q and K take their decay in the one pass that stores them. Anywhere else, and where
heads share q and k, D is a table.

One chunk of all T tokens is the parallel form; C = 1 is the adjoint of the recurrent one. All heads of a block of
sequences go through one batched product on contiguous copies, which reads each twice as fast as strided views of the
inputs. Large temporaries are avoided because page faults, not arithmetic, would then dominate. Half precision is
widened chunk by chunk; all sums are float32 (float64 for float64).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from retnet.ops.decay import decay_from_start, decay_to_end, pairwise_decay, running_log_decay
from retnet.ops.dtypes import wide_dtype
from retnet.ops.huge_pages import empty
from retnet.ops.ragged import equal_blocks

# A fixed decay near 1, rounded to float32 and applied a thousand times, is off by a thousand roundings to one side.
# So one chunk in this many is decayed by what the others should have been decayed by too.
MAKE_UP_EVERY = 16

# Smallest decay of a whole chunk whose D is formed as an outer product: its smallest entries are the square of this,
# still normal numbers, and a factor common to a row or a column costs no digits.
FACTOR_ABOVE = 1e-17


class _ChunkDecay:
    """Decays of one chunk of C tokens for [B or 1] sequences; those that lead to an output carry the scale of q.

    factored: D is the outer product of rows that `from_start` and `to_end` have already been through.
    from_start: scale * a      [B or 1, G, heads of a group, C, 1]
    to_end: b                  [B or 1, G, heads of a group, C, 1]
    whole: decay(chunk)        [B or 1, H, 1, 1]
    make_up: the same, and what rounding took from the others since the last one
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
        """What multiplies the scores of rows from `load_q` and `load_k`: [B or 1, G, heads of a group, C, C]."""
        if self.factored:
            C = self._total.shape[1]
            return self._grouped(self._exact.reciprocal() * self._exact.new_ones(C, C).tril())
        return self._grouped(pairwise_decay(self._total, self._resets, self.whole.dtype).mul_(self._scale))


class _RunningState:
    """S or dS of one walk, advanced in place chunk after chunk: `value` [B H, K, V], `heads` [B, H, K, V] its view."""

    def __init__(self, heads: Tensor, steps: int = 0):
        self.heads, self.value, self.steps = heads, heads.flatten(0, 1), steps
        self.transposed = self.value.transpose(1, 2)

    def advance(self, decay: _ChunkDecay, rows: "_Rows", values: "_Rows") -> None:
        """S <- decay(chunk) S + (b K)^T V, or dS <- decay(chunk) dS + (scale a Q)^T dO, in place."""
        self.steps += 1
        self.heads.mul_(decay.whole if self.steps % MAKE_UP_EVERY else decay.make_up)
        self.value.baddbmm_(rows.transposed, values.flat)

    def clone(self) -> "_RunningState":
        return _RunningState(self.heads.clone(), self.steps)


class _Rows:
    """A buffer of a row for each token of a chunk and head, in the shapes that products and broadcasts take.

    flat [B heads, C, D] and its `transposed`, heads [B, heads, C, D], groups [B, G, heads of a group, C, D].
    """

    def __init__(self, flat: Tensor, B: int, G: int):
        self.flat, self.transposed = flat, flat.transpose(1, 2)
        self.heads = flat.view(B, -1, *flat.shape[1:])
        self.groups = flat.view(B, G, -1, *flat.shape[1:])

    def load(self, part: Tensor) -> "_Rows":
        self.heads.copy_(part)
        return self


class _Scratch:
    """The buffers of a walk for chunks of C tokens, and the steps that forward and backward share.

    `memory` holds the bytes behind them, reused for every chunk and sequence.
    """

    def __init__(self, B: int, G: int, H: int, C: int, K: int, V: int, dtype: torch.dtype, memory: dict[str, Tensor]):
        self.B, self.G, self.H = B, G, H

        def rows(name: str, heads: int, columns: int) -> _Rows:
            size = B * heads * C * columns
            if name not in memory or memory[name].numel() < size:
                memory[name] = torch.empty(size, dtype=dtype)
            return _Rows(memory[name][:size].view(B * heads, C, columns), B, G)

        self.q, self.k, self.raw_scores = rows("q", G, K), rows("k", G, K), rows("raw scores", G, C)
        self.q_decayed, self.k_decayed, self.across = (rows(x, H, K) for x in ("q decayed", "k decayed", "across"))
        self.v, self.dout, self.out = (rows(name, H, V) for name in ("v", "dout", "out"))
        self.scores, self.dscores = rows("scores", H, C), rows("dscores", H, C)

    def load_q(self, part: Tensor, decay: _ChunkDecay) -> _Rows:
        """Rows of q [B, G, C, K] as `decayed_scores` takes them; also fills `q_decayed` with scale a Q."""
        return _load_decayed(part, self.q, self.q_decayed, decay.from_start, decay.factored)

    def load_k(self, part: Tensor, decay: _ChunkDecay) -> _Rows:
        """Rows of k [B, G, C, K] as `decayed_scores` takes them; also fills `k_decayed` with b K."""
        return _load_decayed(part, self.k, self.k_decayed, decay.to_end, decay.factored)

    def decayed_scores(self, q: _Rows, k: _Rows, decay: _ChunkDecay) -> _Rows:
        """scale * Q K^T * D of loaded rows: [B H, C, C]."""
        torch.bmm(q.flat, k.transposed, out=self.raw_scores.flat)
        torch.mul(self.raw_scores.groups, decay.inside, out=self.scores.groups)
        return self.scores

    def decayed_dscores(self, decay: _ChunkDecay) -> _Rows:
        """scale * dO V^T * D, the gradient of Q K^T, or if factored that of the decayed rows' scores: [B H, C, C]."""
        torch.bmm(self.dout.flat, self.v.transposed, out=self.dscores.flat)
        self.dscores.groups.mul_(decay.inside)
        return self.dscores

    def sum_group(self, x: Tensor) -> Tensor:
        """Add up the heads that share q and k: [B H, C, D] -> [B G, C, D]."""
        if self.G == self.H:
            return x
        return x.view(self.B * self.G, -1, *x.shape[1:]).sum(1)

    def read_state(self, rows: _Rows, state: _RunningState, decay: Tensor, factored: bool) -> None:
        """across = rows state^T, and decayed unless factored: [B H, C, K]."""
        torch.bmm(rows.flat, state.transposed, out=self.across.flat)
        if not factored:
            self.across.groups.mul_(decay)

    def store_gradient(self, part: Tensor, dscores: Tensor, rows: _Rows, decay: Tensor, factored: bool) -> None:
        """Write dq or dk: `across`, what came from other chunks, and what the scores give; all decayed if factored."""
        gradient = self.sum_group(self.across.flat).baddbmm_(self.sum_group(dscores), rows.flat)
        gradient = gradient.view(self.B, self.G, *gradient.shape[1:])
        if factored:
            torch.mul(gradient, decay[:, :, 0], out=part)
        else:
            part.copy_(gradient)


def _load_decayed(part: Tensor, plain: _Rows, decayed: _Rows, decay: Tensor, factored: bool) -> _Rows:
    if factored:
        torch.mul(part.unsqueeze(2), decay, out=decayed.groups)
        return decayed
    torch.mul(plain.load(part).groups, decay, out=decayed.groups)
    return plain


class _Walk:
    """One block of B sequences cut into chunks: q [B, G, T, K], v [B, H, T, V], and the decays and buffers of each."""

    def __init__(
        self,
        q: Tensor,
        v: Tensor,
        log_decay: Tensor,
        scale: float,
        chunk_size: int,
        memory: dict[str, Tensor],
        need_dlog: bool = False,
    ):
        self.B, self.G, self.T, self.K = q.shape
        self.H, self.V = v.shape[1], v.shape[3]
        self.log_decay, self.scale, self.chunk_size, self.memory = log_decay, scale, chunk_size, memory
        self.may_factor = log_decay.dim() == 1 and self.G == self.H and not need_dlog
        self.dtype = wide_dtype(v.dtype)
        self.num_chunks = -(-self.T // chunk_size)
        # A decay for each chunk, or one of whole chunks and one of the shorter last chunk.
        self.log_decays = self.split(log_decay, 1) if log_decay.dim() == 3 else None
        self.scratch_of = cache(self._scratch_of)
        self.fixed_decay = cache(self._decay)

    def split(self, x: Tensor, dim: int = 2) -> tuple[Tensor, ...]:
        """Views of x for each chunk; none for T = 0."""
        return x.split(self.chunk_size, dim) if self.T else ()

    def at(self, n: int) -> tuple[_Scratch, _ChunkDecay]:
        """Buffers and decays of chunk n."""
        C = min(self.chunk_size, self.T - n * self.chunk_size)
        decay = self.fixed_decay(C) if self.log_decays is None else self._decay(C, self.log_decays[n])
        return self.scratch_of(C), decay

    def _scratch_of(self, C: int) -> _Scratch:
        return _Scratch(self.B, self.G, self.H, C, self.K, self.V, self.dtype, self.memory)

    def _decay(self, C: int, log_decay: Tensor | None = None) -> _ChunkDecay:
        log_decay = self.log_decay if log_decay is None else log_decay
        return _ChunkDecay(log_decay, C, self.G, self.scale, self.dtype, self.may_factor)

    def running_state(self, state: Tensor | None) -> _RunningState:
        """A copy of a [B, H, K, V] state (or zeros) to update in place."""
        if state is None:
            state = torch.zeros(self.B, self.H, self.K, self.V, dtype=self.dtype)
        return _RunningState(state.to(self.dtype, copy=True).contiguous())


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    state: Tensor | None,
    bounds: list[int] | None,
    chunk_size: int,
    state_dtype: torch.dtype,
    return_state: bool = True,
) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, V] in v's dtype, state [N, H, K, V] in state_dtype); bounds [N + 1] cut one packed row.

    The state is not worked out for the last chunk, and means nothing, unless return_state.
    """
    out = empty(v.shape, v.dtype)
    num_sequences = v.shape[0] if bounds is None else len(bounds) - 1
    final = torch.empty(num_sequences, v.shape[2], q.shape[3], v.shape[3], dtype=state_dtype)
    memory: dict[str, Tensor] = {}
    for rows, tokens, sequences in equal_blocks(v.shape[0], v.shape[1], bounds):
        q_, k_, v_, out_ = (x[rows, tokens].transpose(1, 2) for x in (q, k, v, out))
        walk = _Walk(q_, v_, _tokens(log_decay, rows, tokens), scale, chunk_size, memory)
        S = walk.running_state(None if state is None else state[sequences])
        for n, (q_c, k_c, v_c, out_c) in enumerate(zip(*map(walk.split, (q_, k_, v_, out_)), strict=True)):
            scratch, decay = walk.at(n)
            scores = scratch.decayed_scores(scratch.load_q(q_c, decay), scratch.load_k(k_c, decay), decay)
            torch.bmm(scores.flat, scratch.v.load(v_c).flat, out=scratch.out.flat)
            scratch.out.flat.baddbmm_(scratch.q_decayed.flat, S.value)
            out_c.copy_(scratch.out.heads)
            if return_state or n + 1 < walk.num_chunks:
                S.advance(decay, scratch.k_decayed, scratch.v)
        final[sequences] = S.heads
    return out, final


def backward(
    dout: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    state: Tensor | None,
    bounds: list[int] | None,
    chunk_size: int,
    need_dlog_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """(dq, dk, dv, dlog_decay or None, dstate [N, H, K, V]) for the gradients of both results of `forward`."""
    dq, dk, dv = (empty(x.shape, x.dtype) for x in (q, k, v))
    wide = wide_dtype(v.dtype)
    dlog = torch.zeros(*v.shape[:3], dtype=wide) if need_dlog_decay else None
    num_sequences = v.shape[0] if bounds is None else len(bounds) - 1
    dstate = torch.empty(num_sequences, v.shape[2], q.shape[3], v.shape[3], dtype=wide)
    memory: dict[str, Tensor] = {}
    for rows, tokens, sequences in equal_blocks(v.shape[0], v.shape[1], bounds):
        parts = {"q": q, "k": k, "v": v, "dout": dout, "dq": dq, "dk": dk, "dv": dv}
        block = _Block(
            **{name: x[rows, tokens].transpose(1, 2) for name, x in parts.items()},
            dlog=None if dlog is None else dlog[rows, tokens],
        )
        walk = _Walk(block.q, block.v, _tokens(log_decay, rows, tokens), scale, chunk_size, memory, need_dlog_decay)
        S = walk.running_state(None if state is None else state[sequences])
        checkpoints = _walk_forward(walk, block, S)
        dS = walk.running_state(None if dfinal is None else dfinal[sequences])
        _walk_reverse(walk, block, dS, checkpoints)
        dstate[sequences] = dS.heads
    if dlog is not None and log_decay.dim() == 1:
        dlog = dlog.sum((0, 1))
    return dq, dk, dv, dlog, dstate


@dataclass(frozen=True)
class _Block:
    """Inputs and gradients of one block, [B, heads, T, D] views; dlog [B, T, H] or None if not asked for."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dlog: Tensor | None


def _walk_forward(walk: _Walk, block: _Block, S: _RunningState) -> list[_RunningState]:
    """dQ = (dO V^T * D) K + a dO S^T, walking S over the chunks. Returns S every `_segment` chunks, for dlog alone."""
    checkpoints = []
    dlog = () if block.dlog is None else walk.split(block.dlog, 1)
    names = (block.q, block.k, block.v, block.dout, block.dq)
    for n, (q_c, k_c, v_c, dout_c, dq_c) in enumerate(zip(*map(walk.split, names), strict=True)):
        if block.dlog is not None and n % _segment(walk) == 0:
            checkpoints.append(S.clone())
        scratch, decay = walk.at(n)
        k = scratch.load_k(k_c, decay)
        scratch.v.load(v_c)
        scratch.read_state(scratch.dout.load(dout_c), S, decay.from_start, decay.factored)
        if block.dlog is not None:
            # Token t lies on the way from S to every output i >= t.
            through = (scratch.q.load(q_c).groups * scratch.across.groups).sum(-1)
            dlog[n].add_(through.flatten(1, 2).flip(2).cumsum(2).flip(2).transpose(1, 2))
        scratch.store_gradient(dq_c, scratch.decayed_dscores(decay).flat, k, decay.from_start, decay.factored)
        S.advance(decay, scratch.k_decayed, scratch.v)
    return checkpoints


def _walk_reverse(walk: _Walk, block: _Block, dS: _RunningState, checkpoints: list[_RunningState]) -> None:
    """dV = (Q K^T * D)^T dO + b K dS and dK = (dO V^T * D)^T Q + b V dS^T, walking dS back over the chunks."""
    states = None if block.dlog is None else _states_reversed(walk, block, checkpoints)
    dlog = () if block.dlog is None else walk.split(block.dlog, 1)
    names = (block.q, block.k, block.v, block.dout, block.dk, block.dv)
    for n, (q_c, k_c, v_c, dout_c, dk_c, dv_c) in reversed(list(enumerate(zip(*map(walk.split, names), strict=True)))):
        S = None if states is None else next(states)  # overwrites buffers
        scratch, decay = walk.at(n)
        q, k = scratch.load_q(q_c, decay), scratch.load_k(k_c, decay)
        v, dout, dv = scratch.v.load(v_c), scratch.dout.load(dout_c), scratch.out
        torch.bmm(scratch.decayed_scores(q, k, decay).transposed, dout.flat, out=dv.flat)
        dv_c.copy_(dv.flat.baddbmm_(scratch.k_decayed.flat, dS.value).view_as(dv.heads))
        scratch.read_state(v, dS, decay.to_end, decay.factored)
        dscores = scratch.decayed_dscores(decay)
        if S is not None:
            dlog[n].add_(_dlog_of_chunk(scratch, k, decay, dS.value, S.value))
        scratch.store_gradient(dk_c, dscores.transposed, q, decay.to_end, decay.factored)
        dS.advance(decay, scratch.q_decayed, dout)


def _dlog_of_chunk(scratch: _Scratch, k: _Rows, decay: _ChunkDecay, dS: Tensor, S: Tensor) -> Tensor:
    """Gradient of the chunk's log decays [B, C, H], but for the part that S gives to its outputs.

    The decay of token t multiplies every path from a write s < t to a read i >= t. Paths are added up by where they
    start and end, each sum over paths through t alone: a difference of running sums would cancel.
    """
    paths = scratch.raw_scores.groups * scratch.dscores.groups
    read_from_t = paths.flatten(1, 2).flip(2).cumsum(2).flip(2)
    inside = read_from_t.tril(-1).sum(-1)
    leaving = (k.groups * scratch.across.groups).sum(-1).flatten(1, 2)
    written_before_t = torch.cat([torch.zeros_like(leaving[..., :1]), leaving.cumsum(2)[..., :-1]], 2)
    passing = (dS * S).sum((1, 2)).view(scratch.B, scratch.H, 1) * decay.whole[..., 0]
    return (inside + written_before_t + passing).transpose(1, 2)


def _segment(walk: _Walk) -> int:
    return math.isqrt(walk.num_chunks) + 1


def _states_reversed(walk: _Walk, block: _Block, checkpoints: list[_RunningState]) -> Iterator[_RunningState]:
    """S before each chunk, last chunk first, recomputed a segment at a time from its checkpoint."""
    k, v, segment = walk.split(block.k), walk.split(block.v), _segment(walk)
    for first in reversed(range(0, walk.num_chunks, segment)):
        states = [checkpoints[first // segment]]
        for n in range(first, min(first + segment, walk.num_chunks) - 1):
            S = states[-1].clone()
            scratch, decay = walk.at(n)
            scratch.load_k(k[n], decay)
            S.advance(decay, scratch.k_decayed, scratch.v.load(v[n]))
            states.append(S)
        yield from reversed(states)


def _tokens(log_decay: Tensor, rows: slice, tokens: slice) -> Tensor:
    return log_decay if log_decay.dim() == 1 else log_decay[rows, tokens]
