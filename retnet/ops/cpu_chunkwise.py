"""Chunkwise retention on the CPU: Eq. 7 of the paper streamed through reused buffers, with its own backward.

For every chunk of C tokens, with D the decay inside the chunk, a the decay from its start and b the decay to its end:

    out = (Q K^T * D) V + a Q S            S <- decay(chunk) S + (b K)^T V

The adjoint of retention is retention. The backward makes two passes over the chunks, each with one [K, V] state per
head: forward over S for dQ, and in reverse over dS for dK and dV. Nothing of the forward is kept, so memory beyond the
gradients is a few chunks. Only the gradient of the decay needs S and dS together: S is then checkpointed every
sqrt(T / C) chunks, and the states between two checkpoints are recomputed.

Where a fixed decay keeps all of a chunk above `FACTOR_ABOVE`, D is an outer product, D[t, s] = a_t b_s / decay(chunk)
for s <= t. The vectors a Q and b K that the state needs then serve for the scores too: each is made while q and k are
loaded, and the gradients of Q and K are decayed while they are stored. Anywhere else, and where heads share q and k, D
is a table.

One chunk of all T tokens is the parallel form; C = 1 is the adjoint of the recurrent one. All heads of a block of
sequences go through one batched product on contiguous copies, which are read twice as fast as strided views of the
inputs. Large temporaries are avoided because page faults, not arithmetic, would then dominate. Half precision is
widened chunk by chunk; all sums are float32 (float64 for float64).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from retnet.kernels.retention.problem import RetentionProblem
from retnet.ops.cpu_chunk import ChunkDecay, RunningState, Scratch, Vectors
from retnet.ops.dtypes import wide_dtype
from retnet.ops.huge_pages import empty
from retnet.ops.ragged import equal_blocks


class _Chunks:
    """One block of B sequences cut into chunks, with the decays and buffers of each chunk size in it."""

    def __init__(self, block: RetentionProblem, memory: dict[str, Tensor], need_dlog: bool = False):
        self.B, self.T, self.G, self.K = block.q.shape
        self.H, self.V = block.v.shape[2:]
        self.block, self.memory, self.chunk_size = block, memory, block.chunk_size or 1
        self.may_factor = not block.per_token and self.G == self.H and not need_dlog
        self.dtype = wide_dtype(block.v.dtype)
        self.num_chunks = -(-self.T // self.chunk_size)
        # A decay per chunk, or one for all whole chunks and one for the shorter last chunk.
        self.log_decays = self.split(block.log_decay) if block.per_token else None
        self._scratch: dict[int, Scratch] = {}  # by chunk size
        self._fixed_decays: dict[int, ChunkDecay] = {}

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Views [B, C, ...] of x [B, T, ...] for each chunk; none for T = 0."""
        return x.split(self.chunk_size, 1) if self.T else ()

    def split_heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Views [B, heads, C, D] of x [B, T, heads, D] for each chunk; none for T = 0."""
        return x.transpose(1, 2).split(self.chunk_size, 2) if self.T else ()

    def at(self, n: int) -> tuple[Scratch, ChunkDecay]:
        """Buffers and decays of chunk n."""
        C = min(self.chunk_size, self.T - n * self.chunk_size)
        if C not in self._scratch:
            self._scratch[C] = Scratch(self.B, self.G, self.H, C, self.K, self.V, self.dtype, self.memory)
        if self.log_decays is not None:
            return self._scratch[C], self._decay(C, self.log_decays[n])
        if C not in self._fixed_decays:
            self._fixed_decays[C] = self._decay(C, self.block.log_decay)
        return self._scratch[C], self._fixed_decays[C]

    def _decay(self, C: int, log_decay: Tensor) -> ChunkDecay:
        return ChunkDecay(log_decay, C, self.G, self.block.scale, self.dtype, self.may_factor)

    def running_state(self, state: Tensor | None) -> RunningState:
        """A copy of a [B, H, K, V] state (or zeros) to update in place."""
        if state is None:
            state = torch.zeros(self.B, self.H, self.K, self.V, dtype=self.dtype)
        return RunningState(state.to(self.dtype, copy=True).contiguous())


def forward(
    problem: RetentionProblem, bounds: list[int] | None, state_dtype: torch.dtype, return_state: bool = True
) -> tuple[Tensor, Tensor]:
    """(out [B, T, H, V] in v's dtype, state [N, H, K, V] in state_dtype); bounds [N + 1] are those of cu_seqlens.

    Without return_state, the state is not computed for the last chunk, and means nothing.
    """
    v = problem.v
    out = empty(v.shape, v.dtype)
    final = torch.empty(problem.state_shape, dtype=state_dtype)
    memory: dict[str, Tensor] = {}
    for rows, tokens, sequences in equal_blocks(v.shape[0], v.shape[1], bounds):
        block = problem.block(rows, tokens, sequences)
        chunks = _Chunks(block, memory)
        S = chunks.running_state(block.state)
        parts = map(chunks.split_heads, (block.q, block.k, block.v, out[rows, tokens]))
        for n, (q_c, k_c, v_c, out_c) in enumerate(zip(*parts, strict=True)):
            scratch, decay = chunks.at(n)
            scores = scratch.decayed_scores(scratch.load_q(q_c, decay), scratch.load_k(k_c, decay), decay)
            torch.bmm(scores.flat, scratch.v.load(v_c).flat, out=scratch.out.flat)
            scratch.out.flat.baddbmm_(scratch.q_decayed.flat, S.value)
            out_c.copy_(scratch.out.heads)
            if return_state or n + 1 < chunks.num_chunks:
                S.advance(decay, scratch.k_decayed, scratch.v)
        final[sequences] = S.heads
    return out, final


def backward(
    problem: RetentionProblem, dout: Tensor, dfinal: Tensor | None, bounds: list[int] | None, need_dlog_decay: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """(dq, dk, dv, dlog_decay or None, dstate [N, H, K, V]) for the gradients of both results of `forward`."""
    v = problem.v
    dq, dk, dv = (empty(x.shape, x.dtype) for x in (problem.q, problem.k, v))
    wide = wide_dtype(v.dtype)
    dlog = torch.zeros(*v.shape[:3], dtype=wide) if need_dlog_decay else None
    dstate = torch.empty(problem.state_shape, dtype=wide)
    memory: dict[str, Tensor] = {}
    for rows, tokens, sequences in equal_blocks(v.shape[0], v.shape[1], bounds):
        block = problem.block(rows, tokens, sequences)
        chunks = _Chunks(block, memory, need_dlog_decay)
        gradients = _Gradients(
            *(x[rows, tokens] for x in (dout, dq, dk, dv)), dlog=None if dlog is None else dlog[rows, tokens]
        )
        checkpoints = _forward_pass(chunks, gradients, chunks.running_state(block.state))
        dS = chunks.running_state(None if dfinal is None else dfinal[sequences])
        _reverse_pass(chunks, gradients, dS, checkpoints)
        dstate[sequences] = dS.heads
    if dlog is not None and not problem.per_token:
        dlog = dlog.sum((0, 1))
    return dq, dk, dv, dlog, dstate


@dataclass(frozen=True)
class _Gradients:
    """Gradients of one block, given and to be written, [B, T, heads, D]; dlog [B, T, H] or None if not asked for."""

    dout: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dlog: Tensor | None


def _forward_pass(chunks: _Chunks, gradients: _Gradients, S: RunningState) -> list[RunningState]:
    """dQ = (dO V^T * D) K + a dO S^T, chunk after chunk.

    Returns S every `_checkpoint_every` chunks where the gradient of the decay is asked for.
    """
    block, checkpoints = chunks.block, []
    dlog = () if gradients.dlog is None else chunks.split(gradients.dlog)
    parts = map(chunks.split_heads, (block.q, block.k, block.v, gradients.dout, gradients.dq))
    for n, (q_c, k_c, v_c, dout_c, dq_c) in enumerate(zip(*parts, strict=True)):
        if gradients.dlog is not None and n % _checkpoint_every(chunks) == 0:
            checkpoints.append(S.clone())
        scratch, decay = chunks.at(n)
        k = scratch.load_k(k_c, decay)
        scratch.v.load(v_c)
        scratch.read_state(scratch.dout.load(dout_c), S, decay.from_start, decay.factored)
        if gradients.dlog is not None:
            # Token t lies on the path from S to every output i >= t.
            through = (scratch.q.load(q_c).groups * scratch.across.groups).sum(-1)
            dlog[n].add_(through.flatten(1, 2).flip(2).cumsum(2).flip(2).transpose(1, 2))
        scratch.store_gradient(dq_c, scratch.decayed_dscores(decay).flat, k, decay.from_start, decay.factored)
        S.advance(decay, scratch.k_decayed, scratch.v)
    return checkpoints


def _reverse_pass(chunks: _Chunks, gradients: _Gradients, dS: RunningState, checkpoints: list[RunningState]) -> None:
    """dV = (Q K^T * D)^T dO + b K dS and dK = (dO V^T * D)^T Q + b V dS^T, last chunk first."""
    block = chunks.block
    states = None if gradients.dlog is None else _states_reversed(chunks, checkpoints)
    dlog = () if gradients.dlog is None else chunks.split(gradients.dlog)
    parts = map(chunks.split_heads, (block.q, block.k, block.v, gradients.dout, gradients.dk, gradients.dv))
    for n, (q_c, k_c, v_c, dout_c, dk_c, dv_c) in reversed(list(enumerate(zip(*parts, strict=True)))):
        S = None if states is None else next(states)  # overwrites buffers
        scratch, decay = chunks.at(n)
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


def _dlog_of_chunk(scratch: Scratch, k: Vectors, decay: ChunkDecay, dS: Tensor, S: Tensor) -> Tensor:
    """Gradient of the chunk's log decays [B, C, H], except for the paths from S to the chunk's outputs.

    The decay of token t multiplies every path from a write s < t to a read i >= t. Paths are summed by where they start
    and end, each sum over the paths through t alone: a difference of running sums would cancel.
    """
    paths = scratch.raw_scores.groups * scratch.dscores.groups
    read_from_t = paths.flatten(1, 2).flip(2).cumsum(2).flip(2)
    inside = read_from_t.tril(-1).sum(-1)
    leaving = (k.groups * scratch.across.groups).sum(-1).flatten(1, 2)
    written_before_t = torch.cat([torch.zeros_like(leaving[..., :1]), leaving.cumsum(2)[..., :-1]], 2)
    passing = (dS * S).sum((1, 2)).view(scratch.B, scratch.H, 1) * decay.whole[..., 0]
    return (inside + written_before_t + passing).transpose(1, 2)


def _checkpoint_every(chunks: _Chunks) -> int:
    return math.isqrt(chunks.num_chunks) + 1


def _states_reversed(chunks: _Chunks, checkpoints: list[RunningState]) -> Iterator[RunningState]:
    """S before each chunk, last chunk first, recomputed from one checkpoint at a time."""
    k, v, every = chunks.split_heads(chunks.block.k), chunks.split_heads(chunks.block.v), _checkpoint_every(chunks)
    for first in reversed(range(0, chunks.num_chunks, every)):
        states = [checkpoints[first // every]]
        for n in range(first, min(first + every, chunks.num_chunks) - 1):
            S = states[-1].clone()
            scratch, decay = chunks.at(n)
            scratch.load_k(k[n], decay)
            S.advance(decay, scratch.k_decayed, scratch.v.load(v[n]))
            states.append(S)
        yield from reversed(states)
