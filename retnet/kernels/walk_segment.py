"""The segment kernel: gradients of queries and keys from saved states, for Hopper (TMA through tensor descriptors).

The walk (`walk_kernel`) splits V over programs, so it can produce what is indexed by V alone. dQ and dK are indexed by
K and sum over V. Given the states saved at the borders of segments of S tokens they are local to a segment,

    dQ_t = scale * (gamma^(t - first + 1) dO_t S_n^T + sum_{s <= t} gamma^(t - s) (dO_t . V_s) K_s)
    dK_s = gamma^(last - s) V_s E_n^T + scale * sum_{t >= s} gamma^(t - s) (V_s . dO_t) Q_t

with S_n the state that enters segment n and E_n the gradient of the state that leaves it; the sums run over the
segment. Both are one kernel: readers x, partners y, carriers w; `REVERSE` mirrors it. A program makes ROWS rows of one
output, all of K wide, and loops over V in slices.
"""

import triton
import triton.language as tl


@triton.jit
def _pair_scores(
    x_desc, y_desc, batch, row, column, head, V: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    scores = tl.zeros((ROWS, ROWS), dtype=tl.float32)
    for v in range(0, V, BLOCK_V):
        x = x_desc.load([batch, row, head, v]).reshape(ROWS, BLOCK_V)
        y = y_desc.load([batch, column, head, v]).reshape(ROWS, BLOCK_V)
        scores = tl.dot(x, y.T, scores)
    return scores


@triton.jit
def _decayed(scores, row, column, log2_gamma, scale, ROWS: tl.constexpr, REVERSE: tl.constexpr):
    """Scores masked to the causal side and decayed by the distance of their tokens."""
    reader = (row + tl.arange(0, ROWS))[:, None]
    partner = (column + tl.arange(0, ROWS))[None, :]
    distance = partner - reader if REVERSE else reader - partner
    decay = tl.exp2(log2_gamma * tl.maximum(distance, 0).to(tl.float32)) * scale
    return tl.where(distance >= 0, scores * decay, 0.0)


@triton.jit(do_not_specialize=["tokens"])
def segment_kernel(
    x_desc, y_desc, w_desc, saved_desc, out_desc,  # [B, T, H, V] twice, [B, T, H, K], [B H N, V, K], [B, T, H, K]
    log_decay, scale, tokens, heads,
    K: tl.constexpr, V: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Grid: B * H * ceil(T / ROWS) programs, those of one segment side by side (they share its saved state in L2)."""
    blocks = tl.cdiv(tokens, ROWS)
    block = tl.program_id(0) % blocks
    batch_head = tl.program_id(0) // blocks
    batch = batch_head // heads
    head = batch_head % heads
    row = block * ROWS
    segment = row // SEGMENT
    first = segment * SEGMENT
    end = tl.minimum(first + SEGMENT, tokens)
    saved = batch_head * tl.cdiv(tokens, SEGMENT) + segment
    log2_gamma = tl.maximum(tl.load(log_decay + head) * 1.4426950408889634, -1e30)

    out = tl.zeros((ROWS, K), dtype=tl.float32)
    for v in range(0, V, BLOCK_V):
        x = x_desc.load([batch, row, head, v]).reshape(ROWS, BLOCK_V)
        state = saved_desc.load([saved, v, 0]).reshape(BLOCK_V, K)
        out = tl.dot(x, state, out)
    token = row + tl.arange(0, ROWS)
    if REVERSE:
        read = tl.exp2(log2_gamma * tl.maximum(end - 1 - token, 0).to(tl.float32))
    else:
        read = tl.exp2(log2_gamma * (token - first + 1).to(tl.float32)) * scale
    out *= read[:, None]

    columns_first = row if REVERSE else first
    columns_end = end if REVERSE else row + 1
    for column in range(columns_first, columns_end, ROWS):
        scores = _pair_scores(x_desc, y_desc, batch, row, column, head, V, ROWS, BLOCK_V)
        scores = _decayed(scores, row, column, log2_gamma, scale, ROWS, REVERSE)
        w = w_desc.load([batch, column, head, 0]).reshape(ROWS, K)
        out = tl.dot(scores.to(w.dtype), w, out)
    out_desc.store([batch, row, head, 0], out.to(w_desc.dtype).reshape(1, ROWS, 1, K))
