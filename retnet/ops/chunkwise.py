"""Chunkwise retention on the CPU: Eq. 7 of the paper streamed through reused buffers, with its own backward.

For every chunk of C tokens, with D the decay inside the chunk, a the decay from its start and b the decay to its end:

    out = (Q K^T * D) V + a Q S            S <- decay(chunk) S + (b K)^T V

The adjoint of retention is retention. The backward makes two walks, each with one [K, V] state per head: forward over S
for dQ, and in reverse over dS for dK and dV. Nothing of the forward is kept, so memory beyond the gradients is a few
chunks. Only the gradient of the decay needs S and dS together; S is then checkpointed every sqrt(T / C) chunks and
recomputed a segment at a time.

One chunk of all T tokens is the parallel form; C = 1 is the adjoint of the recurrent one. All heads of a block of
sequences go through one batched product. Large temporaries are avoided because page faults, not arithmetic, would then
dominate. Half precision is widened chunk by chunk; all sums are float32 (float64 for float64).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from retnet.ops.decay import decay_from_start, decay_to_end, pairwise_decay, running_log_decay
from retnet.ops.memory import empty
from retnet.ops.ragged import equal_blocks

# A fixed decay near 1, rounded to float32 and applied a thousand times, is off by a thousand roundings to one side.
# So one chunk in this many is decayed by what the others should have been decayed by too.
MAKE_UP_EVERY = 16


@dataclass(frozen=True)
class _ChunkDecay:
    """Decays of one chunk for [B or 1] sequences; the two that lead to an output carry the scale of q."""

    inside: Tensor  # scale * D            [B or 1, G, heads of a group, C, C]
    from_start: Tensor  # scale * a        [B or 1, G, heads of a group, C, 1]
    to_end: Tensor  # b                    [B or 1, G, heads of a group, C, 1]
    whole: Tensor  # decay(chunk)          [B or 1, H, 1, 1]
    make_up: Tensor  # the same, and what rounding took from the others since the last one


class _RunningState:
    """S or dS of one walk, decayed in place chunk after chunk: `value` [B H, K, V], `heads` [B, H, K, V] its view."""

    def __init__(self, heads: Tensor, steps: int = 0):
        self.heads, self.value, self.steps = heads, heads.flatten(0, 1), steps

    def decay(self, decay: _ChunkDecay) -> None:
        """S <- decay(chunk) S."""
        self.steps += 1
        self.heads.mul_(decay.whole if self.steps % MAKE_UP_EVERY else decay.make_up)

    def clone(self) -> "_RunningState":
        return _RunningState(self.heads.clone(), self.steps)


class _Walk:
    """The pieces that forward and backward share, for one block of B sequences: q [B, G, T, K], v [B, H, T, V].

    Inside the walk tensors are heads-first, [B heads, C, D]; `load` and `store` translate from and to views
    [B, heads, T, D] of the inputs and results.
    """

    def __init__(self, q: Tensor, v: Tensor, log_decay: Tensor, scale: float, chunk_size: int, buffers: dict):
        self.B, self.G, self.T, self.K = q.shape
        self.H, self.V = v.shape[1], v.shape[3]
        self.log_decay, self.scale, self.chunk_size = log_decay, scale, chunk_size
        self.dtype = torch.promote_types(v.dtype, torch.float32)
        self.buffers = buffers

    def buffer(self, name: str, *shape: int) -> Tensor:
        key = (name, shape)
        if key not in self.buffers:
            self.buffers[key] = torch.empty(shape, dtype=self.dtype)
        return self.buffers[key]

    def chunks(self) -> list[slice]:
        return [slice(t, min(t + self.chunk_size, self.T)) for t in range(0, self.T, self.chunk_size)]

    def load(self, name: str, x: Tensor, chunk: slice) -> Tensor:
        part = x.narrow(2, chunk.start, chunk.stop - chunk.start)
        if self.B == 1 and x.dtype == self.dtype:
            return part.select(0, 0)
        return self.buffer(name, *part.shape).copy_(part).flatten(0, 1)

    def store(self, x: Tensor, chunk: slice, value: Tensor) -> None:
        x.narrow(2, chunk.start, chunk.stop - chunk.start).copy_(value.view(self.B, -1, *value.shape[1:]))

    def decay(self, chunk: slice) -> _ChunkDecay:
        length = chunk.stop - chunk.start
        if self.log_decay.dim() == 3:
            return self._decay(self.log_decay[:, chunk], length)
        key = ("decay", length)
        if key not in self.buffers:
            self.buffers[key] = self._decay(self.log_decay, length)
        return self.buffers[key]

    def _decay(self, log_decay: Tensor, length: int) -> _ChunkDecay:
        total, resets = running_log_decay(log_decay, None, length)
        inside = pairwise_decay(total, resets) * self.scale
        from_start = decay_from_start(total, resets).transpose(1, 2)[..., None]
        to_end = decay_to_end(total, resets).transpose(1, 2)[..., None]
        exact = from_start[:, :, -1:]
        whole = exact.to(self.dtype)
        make_up = whole
        if log_decay.dim() == 1:
            missed = (MAKE_UP_EVERY - 1) * (exact.log() - whole.double().log())
            make_up = torch.where(exact > 0.5, exact * missed.exp(), exact).to(self.dtype)

        def grouped(x: Tensor) -> Tensor:
            return x.to(self.dtype).unflatten(1, (self.G, -1))

        return _ChunkDecay(grouped(inside), grouped(from_start * self.scale), grouped(to_end), whole, make_up)

    def per_head(self, x: Tensor) -> Tensor:
        """[B G, C, D] -> [B, G, heads of the group, C, D] by broadcasting."""
        return x.view(self.B, self.G, 1, *x.shape[1:])

    def by_group(self, x: Tensor) -> Tensor:
        """[B H, C, D] -> [B, G, heads of the group, C, D]."""
        return x.view(self.B, self.G, -1, *x.shape[1:])

    def sum_group(self, x: Tensor) -> Tensor:
        """Add up the heads that share q and k: [B H, C, D] -> [B G, C, D]."""
        if self.G == self.H:
            return x
        return x.view(self.B * self.G, -1, *x.shape[1:]).sum(1)

    def decayed(self, name: str, x: Tensor, decay: Tensor) -> Tensor:
        """Rows of q or k times their decay, for each head: [B G, C, K] -> [B H, C, K]."""
        result = self.buffer(name, self.B * self.H, x.shape[1], self.K)
        torch.mul(self.per_head(x), decay, out=self.by_group(result))
        return result

    def decayed_scores(self, q: Tensor, k: Tensor, decay: _ChunkDecay) -> Tensor:
        """scale * Q K^T * D: [B H, C, C]."""
        C = q.shape[1]
        raw = torch.bmm(q, k.transpose(1, 2), out=self.buffer("raw scores", self.B * self.G, C, C))
        scores = self.buffer("scores", self.B * self.H, C, C)
        torch.mul(self.per_head(raw), decay.inside, out=self.by_group(scores))
        return scores

    def decayed_dscores(self, dout: Tensor, v: Tensor, decay: _ChunkDecay) -> Tensor:
        """scale * dO V^T * D, the gradient of Q K^T: [B H, C, C]."""
        C = dout.shape[1]
        dscores = torch.bmm(dout, v.transpose(1, 2), out=self.buffer("dscores", self.B * self.H, C, C))
        self.by_group(dscores).mul_(decay.inside)
        return dscores

    def advance(self, S: _RunningState, k: Tensor, v: Tensor, decay: _ChunkDecay) -> None:
        """S <- decay(chunk) S + (b K)^T V, in place."""
        S.decay(decay)
        S.value.baddbmm_(self.decayed("decayed k", k, decay.to_end).transpose(1, 2), v)

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
    buffers: dict = {}
    for rows, tokens, sequences in equal_blocks(v.shape[0], v.shape[1], bounds):
        q_, k_, v_, out_ = (x[rows, tokens].transpose(1, 2) for x in (q, k, v, out))
        walk = _Walk(q_, v_, _tokens(log_decay, rows, tokens), scale, chunk_size, buffers)
        S = walk.running_state(None if state is None else state[sequences])
        for chunk in walk.chunks():
            decay = walk.decay(chunk)
            q_c, k_c, v_c = walk.load("q", q_, chunk), walk.load("k", k_, chunk), walk.load("v", v_, chunk)
            out_c = torch.bmm(
                walk.decayed_scores(q_c, k_c, decay), v_c, out=walk.buffer("out", walk.B * walk.H, *v_c.shape[1:])
            )
            out_c.baddbmm_(walk.decayed("decayed q", q_c, decay.from_start), S.value)
            walk.store(out_, chunk, out_c)
            if return_state or chunk.stop < walk.T:
                walk.advance(S, k_c, v_c, decay)
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
    wide = torch.promote_types(v.dtype, torch.float32)
    dlog = torch.zeros(*v.shape[:3], dtype=wide) if need_dlog_decay else None
    num_sequences = v.shape[0] if bounds is None else len(bounds) - 1
    dstate = torch.empty(num_sequences, v.shape[2], q.shape[3], v.shape[3], dtype=wide)
    buffers: dict = {}
    for rows, tokens, sequences in equal_blocks(v.shape[0], v.shape[1], bounds):
        parts = {"q": q, "k": k, "v": v, "dout": dout, "dq": dq, "dk": dk, "dv": dv}
        block = _Block(
            **{name: x[rows, tokens].transpose(1, 2) for name, x in parts.items()},
            dlog=None if dlog is None else dlog[rows, tokens],
        )
        walk = _Walk(block.q, block.v, _tokens(log_decay, rows, tokens), scale, chunk_size, buffers)
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
    for n, chunk in enumerate(walk.chunks()):
        if block.dlog is not None and n % _segment(walk) == 0:
            checkpoints.append(S.clone())
        decay = walk.decay(chunk)
        k, v, dout = (
            walk.load("k", block.k, chunk),
            walk.load("v", block.v, chunk),
            walk.load("dout", block.dout, chunk),
        )
        C = k.shape[1]
        across = torch.bmm(dout, S.value.transpose(1, 2), out=walk.buffer("across", walk.B * walk.H, C, walk.K))
        walk.by_group(across).mul_(decay.from_start)
        if block.dlog is not None:
            # Token t lies on the way from S to every output i >= t.
            q = walk.per_head(walk.load("q", block.q, chunk))
            through = (q * walk.by_group(across)).sum(-1)
            block.dlog[:, chunk] += through.flatten(1, 2).flip(2).cumsum(2).flip(2).transpose(1, 2)
        dq = walk.sum_group(across)
        dq.baddbmm_(walk.sum_group(walk.decayed_dscores(dout, v, decay)), k)
        walk.store(block.dq, chunk, dq)
        walk.advance(S, k, v, decay)
    return checkpoints


def _walk_reverse(walk: _Walk, block: _Block, dS: _RunningState, checkpoints: list[_RunningState]) -> None:
    """dV = (Q K^T * D)^T dO + b K dS and dK = (dO V^T * D)^T Q + b V dS^T, walking dS back over the chunks."""
    states = _states_reversed(walk, block, checkpoints) if block.dlog is not None else None
    for chunk in reversed(walk.chunks()):
        decay = walk.decay(chunk)
        q, k = walk.load("q", block.q, chunk), walk.load("k", block.k, chunk)
        v, dout = walk.load("v", block.v, chunk), walk.load("dout", block.dout, chunk)
        C = q.shape[1]
        dv = torch.bmm(
            walk.decayed_scores(q, k, decay).transpose(1, 2), dout, out=walk.buffer("out", walk.B * walk.H, C, walk.V)
        )
        dv.baddbmm_(walk.decayed("decayed k", k, decay.to_end), dS.value)
        walk.store(block.dv, chunk, dv)
        across = torch.bmm(v, dS.value.transpose(1, 2), out=walk.buffer("across", walk.B * walk.H, C, walk.K))
        walk.by_group(across).mul_(decay.to_end)
        dscores = walk.decayed_dscores(dout, v, decay)
        if block.dlog is not None and states is not None:
            block.dlog[:, chunk] += _dlog_of_chunk(walk, q, k, across, dscores, dS.value, next(states).value, decay)
        dk = walk.sum_group(across)
        dk.baddbmm_(walk.sum_group(dscores).transpose(1, 2), q)
        walk.store(block.dk, chunk, dk)
        dS.decay(decay)
        dS.value.baddbmm_(walk.decayed("decayed q", q, decay.from_start).transpose(1, 2), dout)


def _dlog_of_chunk(
    walk: _Walk, q: Tensor, k: Tensor, across: Tensor, dscores: Tensor, dS: Tensor, S: Tensor, decay: _ChunkDecay
) -> Tensor:
    """Gradient of the chunk's log decays [B, C, H], but for the part that S gives to its outputs.

    The decay of token t multiplies every path from a write s < t to a read i >= t. Paths are added up by where they
    start and end, each sum over paths through t alone: a difference of running sums would cancel.
    """
    C = q.shape[1]
    raw = torch.bmm(q, k.transpose(1, 2))
    paths = walk.per_head(raw) * walk.by_group(dscores)
    read_from_t = paths.flatten(1, 2).flip(2).cumsum(2).flip(2)
    inside = read_from_t.tril(-1).sum(-1)
    leaving = (walk.per_head(k) * walk.by_group(across)).sum(-1).flatten(1, 2)
    written_before_t = torch.cat([leaving.new_zeros(walk.B, walk.H, 1), leaving.cumsum(2)[..., : C - 1]], 2)
    passing = (dS * S).sum((1, 2)).view(walk.B, walk.H, 1) * decay.whole[..., 0]
    return (inside + written_before_t + passing).transpose(1, 2)


def _segment(walk: _Walk) -> int:
    return math.isqrt(len(walk.chunks())) + 1


def _states_reversed(walk: _Walk, block: _Block, checkpoints: list[_RunningState]) -> Iterator[_RunningState]:
    """S before each chunk, last chunk first, recomputed a segment at a time from its checkpoint."""
    chunks, segment = walk.chunks(), _segment(walk)
    for n in reversed(range(len(checkpoints))):
        states = [checkpoints[n]]
        for chunk in chunks[n * segment : (n + 1) * segment][:-1]:
            S = states[-1].clone()
            walk.advance(S, walk.load("k s", block.k, chunk), walk.load("v s", block.v, chunk), walk.decay(chunk))
            states.append(S)
        yield from reversed(states)


def _tokens(log_decay: Tensor, rows: slice, tokens: slice) -> Tensor:
    return log_decay if log_decay.dim() == 1 else log_decay[rows, tokens]
