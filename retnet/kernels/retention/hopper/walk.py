"""The walk: chunkwise retention with the state in registers, for Hopper (wgmma, TMA, warp specialization).

One program owns a part of a sequence, a head and a slice of the values, and walks it in chunks of 64 tokens. With
readers x, writers y (both [tokens, keys]) and values z it computes, per chunk of L tokens entered with the state S
(paper, Eq. 7, plus the in-chunk decay of the writers that the printed equation leaves out):

    out_r = read_r * x_r S + sum_w pair_rw (x_r . y_w) z_w          S' = gamma^L S + sum_w write_w y_w^T z_w

Forward retention is walk(q, k, v), and the adjoint of retention is retention: `REVERSE` starts at the end of the
sequence, sums over the other side of the diagonal, and the state it carries is then the gradient of the state.

    dV = reverse walk(k, q, dO)        dQ = walk(dO, V, K)        dK = reverse walk(V, dO, Q)

dQ and dK contract over V. Where that is wider than a program holds, two programs (`SPLITS`) take a range of the keys
each and add their parts to an output of zeros: everything above is linear in the products over keys, and a sum of two
has the same bits in either order.

Why it looks so: a state written to memory per chunk moves more bytes than q, k, v and the output together, so it stays
on chip, transposed ([64 values, keys] a warpgroup), which makes it the register operand of the read and the accumulator
of the update: it never passes through shared memory. The warps have roles: one issues the TMA loads, one warpgroup
computes the decayed scores that all values share, one or two warpgroups of 64 values each read, mix and update. Every
decay is the exp of a non-positive difference.

Masked tokens and packed documents (`HAS_CODES`) change the decays of the chunks that hold one and of no other: those
chunks get their factors from `codes` (`token_codes`), the others the same ones as without.

Left out: per-token decay, groups of heads, initial states of packed documents, float16 with masked tokens or packed
documents (the portable kernels take those).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from retnet.kernels.retention.hopper.warp_roles import (
    AHEAD,
    CHUNK,
    GROUP_VALUES,
    RATE_ROW,
    SCALE_ROW,
    first_barrier,
    load_role,
    mix_role,
    score_role,
)

_CHUNK = gl.constexpr(CHUNK)
_GROUP_VALUES = gl.constexpr(GROUP_VALUES)
_AHEAD = gl.constexpr(AHEAD)
_LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _init_ring(barriers, FULL: gl.constexpr, STAGES: gl.constexpr, READERS: gl.constexpr):
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.index(FULL + stage), count=1)
        mbarrier.init(barriers.index(FULL + STAGES + stage), count=READERS)


@gluon.jit
def _make_decays(log2_gamma, scale, factor, tail, REVERSE: gl.constexpr):
    """Rows: read, write and keep of a full chunk, of the last one, room for each warpgroup's special ones; rate, scale.

    Writers are multiplied by the state's `factor`, readers divided by it. The last chunk may be shorter: what TMA
    brings for its missing rows, zeros or other tokens, is not written.
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
    """The factor of every score of a chunk, readers by writers: causal mask, decay of the distance, scale.

    [TABLES, 64, 64], the first filled; a second one has room for a special chunk."""
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
    x_desc, y_desc, z_desc, out_desc,  # [B, T, H, SPLITS * KEYS] twice, [B, T, H, VALUES] twice
    log_decay, scale, state_in, state_out,  # [H], (), states [B, H, parts, ...] twice (float32)
    codes, cu_seqlens,  # [B, chunks * 64] if HAS_CODES, [N + 1] if PER_DOCUMENT (then B = 1)
    factors,  # [H] of float16 states (`state_range`)
    tokens, heads, parts, part_chunks,
    KEYS: gl.constexpr, VALUES: gl.constexpr, SPLITS: gl.constexpr, GROUPS: gl.constexpr,
    KEY_STRIDE: gl.constexpr, VALUE_STRIDE: gl.constexpr,
    REVERSE: gl.constexpr, READ: gl.constexpr, HAS_CODES: gl.constexpr, PER_DOCUMENT: gl.constexpr,
    HAS_INITIAL: gl.constexpr, STORE_FINAL: gl.constexpr,
    X_STAGES: gl.constexpr, Y_STAGES: gl.constexpr, Z_STAGES: gl.constexpr,
    MIX_REGISTERS: gl.constexpr, SCORE_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid: B * H * parts * SPLITS * VALUES / (64 GROUPS) programs; those that share x and y tiles are neighbours.

    Without readers, for the states that parts start from, one part fewer: the last of the walk."""
    SLICE: gl.constexpr = _GROUP_VALUES * GROUPS
    SLICES: gl.constexpr = VALUES // SLICE
    dtype: gl.constexpr = z_desc.dtype
    program = gl.program_id(0)
    value = program % SLICES * SLICE
    split = program // SLICES % SPLITS
    walker = program // (SLICES * SPLITS)
    part = walker % parts
    row = walker // parts
    if not READ and not PER_DOCUMENT:  # no part starts from what the last one leaves
        part = walker % (parts - 1) + (1 if REVERSE else 0)
        row = walker // (parts - 1)
        walker = row * parts + part
    batch = row // heads
    head = row % heads
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
    log2_gamma = gl.maximum(gl.load(log_decay + head) * _LOG2_E, -1e30)  # finite, so that gamma = 0 gives 0^0 = 1
    state_at = walker.to(gl.int64) * (SPLITS * KEYS * VALUES) + key * KEY_STRIDE + value * VALUE_STRIDE

    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    x_smem = gl.allocate_shared_memory(dtype, [X_STAGES if READ else 1, _CHUNK, KEYS if READ else 64], wide)
    y_smem = gl.allocate_shared_memory(dtype, [Y_STAGES, _CHUNK, KEYS], wide)
    z_smem = gl.allocate_shared_memory(dtype, [Z_STAGES, _CHUNK, SLICE], wide)
    p_smem = gl.allocate_shared_memory(dtype, [_AHEAD, _CHUNK, _CHUNK], wide)
    X: gl.constexpr = first_barrier(0, x_smem, y_smem)
    Y: gl.constexpr = first_barrier(1, x_smem, y_smem)
    Z: gl.constexpr = first_barrier(2, x_smem, y_smem)
    barriers = gl.allocate_shared_memory(gl.int64, [Z + 2 * Z_STAGES, 1], mbarrier.MBarrierLayout())
    _init_ring(barriers, 0, _AHEAD, GROUPS)
    _init_ring(barriers, X, x_smem.shape[0], GROUPS + 1)
    _init_ring(barriers, Y, Y_STAGES, GROUPS + 1 if READ else GROUPS)
    _init_ring(barriers, Z, Z_STAGES, GROUPS)
    outs_smem = gl.allocate_shared_memory(dtype, [GROUPS, _CHUNK, _GROUP_VALUES], wide)
    factor = gl.load(factors + head) if dtype == gl.float16 else 1.0
    decays = _make_decays(log2_gamma, scale, factor, tail, REVERSE)
    pairs = _make_pairs(log2_gamma, scale, 2 if HAS_CODES else 1, REVERSE) if READ else decays
    fence_async_shared()

    # Constexprs stay inside the calls: assigned to a name they would become run-time scalars.
    loading = (x_desc, y_desc, z_desc, x_smem, y_smem, z_smem, barriers, batch, head, key, value, start, count)
    sequence_codes = codes + batch * chunks * _CHUNK
    scoring = (x_smem, y_smem, p_smem, pairs, decays, barriers, sequence_codes, start, count)
    mixing = (
        x_smem, y_smem, z_smem, p_smem, outs_smem, barriers, decays, out_desc,
        state_in + state_at, state_out + state_at, batch, head, value, start, count, last_step, sequence_codes,
    )  # fmt: skip
    _start_roles(
        mixing, scoring, loading,
        GROUPS, REVERSE, READ, HAS_CODES, HAS_INITIAL, STORE_FINAL, KEY_STRIDE, VALUE_STRIDE, SPLITS == 2,
        MIX_REGISTERS, SCORE_REGISTERS, LOAD_REGISTERS,
    )  # fmt: skip


@gluon.jit
def _start_roles(
    mixing, scoring, loading,
    GROUPS: gl.constexpr, REVERSE: gl.constexpr, READ: gl.constexpr, HAS_CODES: gl.constexpr,
    HAS_INITIAL: gl.constexpr, STORE_FINAL: gl.constexpr, KEY_STRIDE: gl.constexpr, VALUE_STRIDE: gl.constexpr,
    ADD: gl.constexpr,
    MIX_REGISTERS: gl.constexpr, SCORE_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One or two warpgroups mix, one scores if there are readers, and one warp loads.

    Each of the four cases is written out: added lists or a named one would turn their constexprs into run-time values.
    """
    LOWER: gl.constexpr = 0
    UPPER: gl.constexpr = 1
    if GROUPS == 2 and READ:
        gl.warp_specialize(
            [
                (
                    mix_role,
                    (mixing, LOWER, REVERSE, READ, HAS_CODES, HAS_INITIAL, STORE_FINAL, KEY_STRIDE, VALUE_STRIDE, ADD),
                ),
                (
                    mix_role,
                    (mixing, UPPER, REVERSE, READ, HAS_CODES, HAS_INITIAL, STORE_FINAL, KEY_STRIDE, VALUE_STRIDE, ADD),
                ),
                (score_role, (scoring, REVERSE, HAS_CODES)),
                (load_role, (loading, REVERSE, READ)),
            ],
            [4, 4, 1],
            [MIX_REGISTERS, SCORE_REGISTERS, LOAD_REGISTERS],
        )
    elif GROUPS == 2:
        gl.warp_specialize(
            [
                (
                    mix_role,
                    (mixing, LOWER, REVERSE, READ, HAS_CODES, HAS_INITIAL, STORE_FINAL, KEY_STRIDE, VALUE_STRIDE, ADD),
                ),
                (
                    mix_role,
                    (mixing, UPPER, REVERSE, READ, HAS_CODES, HAS_INITIAL, STORE_FINAL, KEY_STRIDE, VALUE_STRIDE, ADD),
                ),
                (load_role, (loading, REVERSE, READ)),
            ],
            [4, 1],
            [MIX_REGISTERS, LOAD_REGISTERS],
        )
    elif READ:
        gl.warp_specialize(
            [
                (
                    mix_role,
                    (mixing, LOWER, REVERSE, READ, HAS_CODES, HAS_INITIAL, STORE_FINAL, KEY_STRIDE, VALUE_STRIDE, ADD),
                ),
                (score_role, (scoring, REVERSE, HAS_CODES)),
                (load_role, (loading, REVERSE, READ)),
            ],
            [4, 1],
            [SCORE_REGISTERS, LOAD_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (
                    mix_role,
                    (mixing, LOWER, REVERSE, READ, HAS_CODES, HAS_INITIAL, STORE_FINAL, KEY_STRIDE, VALUE_STRIDE, ADD),
                ),
                (load_role, (loading, REVERSE, READ)),
            ],
            [1],
            [LOAD_REGISTERS],
        )
