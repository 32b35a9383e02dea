"""The walk: chunkwise retention with the state in registers, for Hopper (wgmma, TMA, warp specialization).

One program owns a part of a sequence, a head and a slice of the values, and walks the part in chunks of 64 tokens. It
has readers x and writers y (both [tokens, keys]) and values z. Per chunk of L tokens, entered with the state S, it
computes (paper, Eq. 7, plus the decay of the writers inside the chunk that the printed equation leaves out):

    out_r = read_r * x_r S + sum_w pair_rw (x_r . y_w) z_w          S' = gamma^L S + sum_w write_w y_w^T z_w

Forward retention is walk(q, k, v). The adjoint of retention is retention: with `REVERSE` a walk starts at the end of
the sequence and sums over the other side of the diagonal, and its state is the gradient of the state.

    dV = reverse walk(k, q, dO)        dQ = walk(dO, V, K)        dK = reverse walk(V, dO, Q)

dQ and dK contract over V. If V is wider than one program can hold, two programs (`SPLITS`) take half of the keys each
and add to an output of zeros. All of the above is linear in the products over keys, and a sum of two terms has the same
bits in either order.

The state stays on chip because a state written to memory per chunk would move more bytes than q, k, v and the output
together. It is kept transposed, [64 values, keys] per warpgroup. In this form it is the register operand of the read
and the accumulator of the update, and never passes through shared memory. The warps have roles: one warp issues the TMA
loads, one warpgroup computes the decayed scores that all values share, and one or two warpgroups of 64 values each
read, mix and update. Every decay is the exp of a difference that is not positive.

Masked tokens and packed documents (`HAS_CODES`) change the decays of special chunks: those that have a masked token or
a document boundary. These chunks take their factors from `codes` (`token_codes`), all others use the usual ones.

With a decay per token (`PER_TOKEN`) every chunk takes its factors from running sums of its log decays (`token_sums`),
which know of masks and documents. Walks for the gradient of log_decay (`TERMS` > 0) leave what it is made of
(`decay_gradient.py`).

Heads may share x and y, or z. The output is per head.

Not supported, and left to the portable kernels: initial states of packed documents, and float16 with masked tokens,
packed documents or a decay per token.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from retnet.kernels.retention.hopper.borders import last_border
from retnet.kernels.retention.hopper.warp_roles import (
    CHUNK,
    GROUP_VALUES,
    RATE_ROW,
    SCALE_ROW,
    SCORE_STAGES,
    first_barrier,
    load_role,
    mix_role,
    score_role,
)

_CHUNK = gl.constexpr(CHUNK)
_GROUP_VALUES = gl.constexpr(GROUP_VALUES)
_SCORE_STAGES = gl.constexpr(SCORE_STAGES)
_LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _init_pipeline(barriers, FULL: gl.constexpr, STAGES: gl.constexpr, READERS: gl.constexpr):
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.index(FULL + stage), count=1)
        mbarrier.init(barriers.index(FULL + STAGES + stage), count=READERS)


@gluon.jit
def _make_decays(log2_gamma, scale, factor, tail, REVERSE: gl.constexpr):
    """A table [14, 64]. Rows 0-2: read, write and keep of a full chunk; 3-5: of the last chunk; 6-11: room for those of
    a special chunk, three per warpgroup; 12: log2(gamma); 13: scale.

    Writers are multiplied by the state's `factor`, readers are divided by it. The last chunk may be shorter: whatever
    TMA loads past its end, zeros or other tokens, is not written.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    decays = gl.allocate_shared_memory(gl.float32, [14, _CHUNK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    token = gl.arange(0, _CHUNK, layout)
    for last in gl.static_range(2):
        length = tail if last == 1 else _CHUNK
        from_start = gl.exp2(log2_gamma * (token + 1).to(gl.float32)) * (scale * factor if REVERSE else scale / factor)
        to_end = gl.exp2(log2_gamma * gl.maximum(length - 1 - token, 0).to(gl.float32))
        to_end = to_end / factor if REVERSE else to_end * factor
        write = gl.where(token < length, from_start if REVERSE else to_end, 0.0)
        decays.index(3 * last + 0).store(to_end if REVERSE else from_start)
        decays.index(3 * last + 1).store(write)
        decays.index(3 * last + 2).store(gl.exp2(log2_gamma * (length + token * 0).to(gl.float32)))
    decays.index(RATE_ROW).store(log2_gamma + token.to(gl.float32) * 0.0)
    decays.index(SCALE_ROW).store(scale + token.to(gl.float32) * 0.0)
    return decays


@gluon.jit
def _make_pairs(log2_gamma, scale, TABLES: gl.constexpr, REVERSE: gl.constexpr):
    """Tables [TABLES, 64, 64] of the factor of every score of a chunk, readers by writers: causal mask, decay of the
    distance, scale. The first one is filled; the second one is room for a special chunk."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [gl.num_warps(), 1], [1, 0])
    smem: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])  # free of bank conflicts in the layout of a product
    reader = gl.arange(0, _CHUNK, gl.SliceLayout(1, layout))[:, None]
    writer = gl.arange(0, _CHUNK, gl.SliceLayout(0, layout))[None, :]
    distance = (writer - reader if REVERSE else reader - writer).to(gl.float32)
    decay = gl.exp2(log2_gamma * gl.maximum(distance, 0.0)) * scale
    pairs = gl.allocate_shared_memory(gl.float32, [TABLES, _CHUNK, _CHUNK], smem)
    pairs.index(0).store(gl.where(distance >= 0, decay, 0.0))
    return pairs


@gluon.jit(do_not_specialize=["tokens", "parts", "part_chunks"])
def walk_kernel(
    x_desc, y_desc, z_desc, out_desc,  # [B, T, H / XY_HEADS, SPLITS * KEYS] twice, [B, T, H / Z_HEADS or H, VALUES]
    log_decay, scale, state_in, state_out,  # [H], (), states [B, H, parts, ...] twice (float32)
    codes, cu_seqlens,  # [B, chunks * 64] if HAS_CODES, [N + 1] if PER_DOCUMENT (then B = 1)
    sums,  # [B, H, chunks * 64] if PER_TOKEN (`token_sums`)
    factors,  # [H] of float16 states (`state_factors`)
    partner_desc, dots, borders, products,  # if TERMS > 0 (`decay_gradient.py`), else None
    tokens, heads, parts, part_chunks,
    KEYS: gl.constexpr, VALUES: gl.constexpr, SPLITS: gl.constexpr, GROUPS: gl.constexpr,
    KEY_STRIDE: gl.constexpr, VALUE_STRIDE: gl.constexpr,
    REVERSE: gl.constexpr, READ: gl.constexpr, HAS_CODES: gl.constexpr, PER_DOCUMENT: gl.constexpr,
    HAS_INITIAL: gl.constexpr, STORE_FINAL: gl.constexpr, PER_TOKEN: gl.constexpr,
    XY_HEADS: gl.constexpr, Z_HEADS: gl.constexpr, TERMS: gl.constexpr,
    X_STAGES: gl.constexpr, Y_STAGES: gl.constexpr, Z_STAGES: gl.constexpr,
    MIX_REGISTERS: gl.constexpr, SCORE_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid: B * H * parts * SPLITS * VALUES / (64 GROUPS) programs; those that share tiles of x and y are neighbours.

    Without readers the grid has one part fewer: no part starts from what the last one leaves."""
    SLICE: gl.constexpr = _GROUP_VALUES * GROUPS
    SLICES: gl.constexpr = VALUES // SLICE
    dtype: gl.constexpr = z_desc.dtype
    program = gl.program_id(0)
    value = program % SLICES * SLICE
    split = program // SLICES % SPLITS
    state_index = program // (SLICES * SPLITS)
    part = state_index % parts
    sequence_head = state_index // parts
    if not READ and not PER_DOCUMENT:  # the last part is skipped
        part = state_index % (parts - 1) + (1 if REVERSE else 0)
        sequence_head = state_index // (parts - 1)
        state_index = sequence_head * parts + part
    batch = sequence_head // heads
    head = sequence_head % heads
    key = split * KEYS
    origin = 0
    if PER_DOCUMENT:
        origin = gl.load(cu_seqlens + batch).to(gl.int32)
        tokens = gl.load(cu_seqlens + batch + 1).to(gl.int32) - origin
        batch = 0
    chunks = (tokens + _CHUNK - 1) // _CHUNK
    tail = tokens - (chunks - 1) * _CHUNK
    first = part * part_chunks
    count = gl.minimum(chunks - first, part_chunks)
    start = origin + (first + count - 1 if REVERSE else first) * _CHUNK
    last_step = first + count - chunks if REVERSE else chunks - 1 - first  # the step of the last chunk, if it is here
    log2_gamma = gl.maximum(gl.load(log_decay + head) * _LOG2_E, -1e30)  # finite: gamma = 0 gives 0^0 = 1
    state_at = state_index.to(gl.int64) * (SPLITS * KEYS * VALUES) + key * KEY_STRIDE + value * VALUE_STRIDE

    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    x_smem = gl.allocate_shared_memory(dtype, [X_STAGES if READ else 1, _CHUNK, KEYS if READ else 64], wide)
    y_smem = gl.allocate_shared_memory(dtype, [Y_STAGES, _CHUNK, KEYS], wide)
    z_smem = gl.allocate_shared_memory(dtype, [Z_STAGES, _CHUNK, SLICE], wide)
    p_smem = gl.allocate_shared_memory(dtype, [_SCORE_STAGES, _CHUNK, _CHUNK], wide)
    X: gl.constexpr = first_barrier(0, x_smem, y_smem)
    Y: gl.constexpr = first_barrier(1, x_smem, y_smem)
    Z: gl.constexpr = first_barrier(2, x_smem, y_smem)
    COUNT: gl.constexpr = Z + 2 * Z_STAGES + (GROUPS if TERMS > 0 else 0)
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    _init_pipeline(barriers, 0, _SCORE_STAGES, GROUPS)
    _init_pipeline(barriers, X, x_smem.shape[0], GROUPS + 1)
    _init_pipeline(barriers, Y, Y_STAGES, GROUPS + 1 if READ else GROUPS)
    _init_pipeline(barriers, Z, Z_STAGES, GROUPS)
    for i in gl.static_range(Z + 2 * Z_STAGES, COUNT):
        mbarrier.init(barriers.index(i), count=1)  # of `partner`
    outs_smem = gl.allocate_shared_memory(dtype, [GROUPS, _CHUNK, _GROUP_VALUES], wide)
    factor = gl.load(factors + head) if dtype == gl.float16 else 1.0
    decays = _make_decays(log2_gamma, scale, factor, tail, REVERSE)
    pairs = _make_pairs(log2_gamma, scale, 2 if HAS_CODES else 1, REVERSE) if READ else decays
    fence_async_shared()

    # Constexprs are passed in the call itself: assigned to a name they would become run-time scalars.
    xy_head, z_head = head // XY_HEADS, head // Z_HEADS
    loading = (
        x_desc, y_desc, z_desc, x_smem, y_smem, z_smem, barriers, batch, xy_head, z_head, key, value, start, count,
    )  # fmt: skip
    sequence_codes = codes + batch * chunks * _CHUNK
    sequence_sums = sums + sequence_head.to(gl.int64) * (chunks * _CHUNK)
    scoring = (x_smem, y_smem, p_smem, pairs, decays, barriers, sequence_codes, sequence_sums, start, count)
    mixing = (
        x_smem, y_smem, z_smem, p_smem, outs_smem, barriers, decays, out_desc,
        state_in + state_at, state_out + state_at, batch, head, value, start, count, last_step, sequence_codes,
        sequence_sums,
    )  # fmt: skip
    crossing = ()
    if TERMS > 0:
        terms = sequence_head.to(gl.int64) * TERMS
        borders_at = terms * (last_border(chunks) + 2) * _GROUP_VALUES
        first_term = (split * SLICES + program % SLICES) * GROUPS
        crossing = (
            partner_desc, dots + terms * (chunks * _CHUNK), borders + borders_at * KEYS, products + borders_at,
            z_head, chunks, first_term,
        )  # fmt: skip
    _start_roles(
        mixing, scoring, loading, crossing,
        GROUPS, REVERSE, READ, HAS_CODES, PER_TOKEN, HAS_INITIAL, STORE_FINAL, KEY_STRIDE, VALUE_STRIDE, SPLITS == 2,
        TERMS, MIX_REGISTERS, SCORE_REGISTERS, LOAD_REGISTERS,
    )  # fmt: skip


@gluon.jit
def _start_roles(
    mixing, scoring, loading, crossing,
    GROUPS: gl.constexpr, REVERSE: gl.constexpr, READ: gl.constexpr, HAS_CODES: gl.constexpr, PER_TOKEN: gl.constexpr,
    INITIAL: gl.constexpr, FINAL: gl.constexpr, KEY_STRIDE: gl.constexpr, VALUE_STRIDE: gl.constexpr,
    ADD: gl.constexpr, TERMS: gl.constexpr,
    MIX_REGISTERS: gl.constexpr, SCORE_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One or two warpgroups mix, one scores if there are readers, and one warp loads.

    The four cases are written out, because a list that is built or named loses the constexprs in it.
    """
    LOWER: gl.constexpr = 0
    UPPER: gl.constexpr = 1
    if GROUPS == 2 and READ:
        gl.warp_specialize(
            [
                (mix_role, (mixing, crossing, LOWER, REVERSE, READ, HAS_CODES, PER_TOKEN, INITIAL, FINAL,
                            KEY_STRIDE, VALUE_STRIDE, ADD, TERMS)),
                (mix_role, (mixing, crossing, UPPER, REVERSE, READ, HAS_CODES, PER_TOKEN, INITIAL, FINAL,
                            KEY_STRIDE, VALUE_STRIDE, ADD, TERMS)),
                (score_role, (scoring, REVERSE, HAS_CODES, PER_TOKEN)),
                (load_role, (loading, REVERSE, READ)),
            ],
            [4, 4, 1],
            [MIX_REGISTERS, SCORE_REGISTERS, LOAD_REGISTERS],
        )  # fmt: skip
    elif GROUPS == 2:
        gl.warp_specialize(
            [
                (mix_role, (mixing, crossing, LOWER, REVERSE, READ, HAS_CODES, PER_TOKEN, INITIAL, FINAL,
                            KEY_STRIDE, VALUE_STRIDE, ADD, TERMS)),
                (mix_role, (mixing, crossing, UPPER, REVERSE, READ, HAS_CODES, PER_TOKEN, INITIAL, FINAL,
                            KEY_STRIDE, VALUE_STRIDE, ADD, TERMS)),
                (load_role, (loading, REVERSE, READ)),
            ],
            [4, 1],
            [MIX_REGISTERS, LOAD_REGISTERS],
        )  # fmt: skip
    elif READ:
        gl.warp_specialize(
            [
                (mix_role, (mixing, crossing, LOWER, REVERSE, READ, HAS_CODES, PER_TOKEN, INITIAL, FINAL,
                            KEY_STRIDE, VALUE_STRIDE, ADD, TERMS)),
                (score_role, (scoring, REVERSE, HAS_CODES, PER_TOKEN)),
                (load_role, (loading, REVERSE, READ)),
            ],
            [4, 1],
            [SCORE_REGISTERS, LOAD_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (mix_role, (mixing, crossing, LOWER, REVERSE, READ, HAS_CODES, PER_TOKEN, INITIAL, FINAL,
                            KEY_STRIDE, VALUE_STRIDE, ADD, TERMS)),
                (load_role, (loading, REVERSE, READ)),
            ],
            [1],
            [LOAD_REGISTERS],
        )  # fmt: skip
