"""The walk: chunkwise retention with the state in registers, for Hopper (wgmma, TMA, warp specialization).

One program owns a (sequence segment, head, slice of V) and walks it in chunks of 64 tokens. With readers x, writers y
and values z it computes, per chunk of L tokens entered with the state S [K, V] (paper, Eq. 7, plus the in-chunk decay
of the writers that the printed equation leaves out):

    out_r = read_r * x_r S + sum_w pair_rw (x_r . y_w) z_w          S' = gamma^L S + sum_w write_w y_w^T z_w

Forward retention is walk(q, k, v). Its adjoint in V is the same walk from the end of the sequence with q and k
exchanged, dV = walk(k, q, dO), and the state it carries is then the gradient of the state. Both directions are one
kernel: `REVERSE` flips the order of the chunks and which side of the diagonal counts.

Why it looks so: a [K, V] state does not survive a trip to memory per chunk at the speed of the tensor cores, so it
stays on chip, transposed ([64 values, K] a warpgroup), which makes it the register operand of the read and the
accumulator of the update: it never passes through shared memory. The warps have roles: one issues TMA loads, one
warpgroup computes the decayed scores that all readers of the chunk share, one or two warpgroups of 64 values each read,
mix and update. Every decay is the exp of a non-positive difference.

Left out: masks, packed sequences, per-token decay, groups of heads (the portable kernels take those).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

CHUNK = 64  # tokens a step: the M of one warpgroup instruction, so that scores and values tile without waste
ROWS = 64  # values a warpgroup holds, likewise
PIECE = 64  # key columns of a state piece: splitting the state bounds the registers of its 16-bit copy


@gluon.jit
def _chunk_at(step, first, count, REVERSE: gl.constexpr):
    return first + (count - 1 - step if REVERSE else step)


@gluon.jit
def _load(
    load_args, REVERSE: gl.constexpr, READ: gl.constexpr,
    X_STAGES: gl.constexpr, Y_STAGES: gl.constexpr, Z_STAGES: gl.constexpr,
):  # fmt: skip
    """Bring the tiles of every chunk into their rings, in the order in which they are needed."""
    (
        x_desc, y_desc, z_desc, x_smem, y_smem, z_smem, x_full, x_empty, y_full, y_empty, z_full, z_empty,
        batch, head, v_start, first, count,
    ) = load_args  # fmt: skip
    for step in range(count):
        token = _chunk_at(step, first, count, REVERSE) * CHUNK_TOKENS
        if READ:
            stage = step % X_STAGES
            mbarrier.wait(x_empty.index(stage), ((step // X_STAGES) & 1) ^ 1)
            mbarrier.expect(x_full.index(stage), x_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                x_desc, [batch, token, head, 0], x_full.index(stage), _as_block(x_smem.index(stage), x_desc)
            )
        stage = step % Y_STAGES
        mbarrier.wait(y_empty.index(stage), ((step // Y_STAGES) & 1) ^ 1)
        mbarrier.expect(y_full.index(stage), y_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            y_desc, [batch, token, head, 0], y_full.index(stage), _as_block(y_smem.index(stage), y_desc)
        )
        stage = step % Z_STAGES
        mbarrier.wait(z_empty.index(stage), ((step // Z_STAGES) & 1) ^ 1)
        mbarrier.expect(z_full.index(stage), z_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            z_desc, [batch, token, head, v_start], z_full.index(stage), _as_block(z_smem.index(stage), z_desc)
        )


@gluon.jit
def _as_block(smem, desc):
    """View a [tokens, features] tile as the [1, tokens, 1, features] block of a descriptor."""
    return smem._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)


CHUNK_TOKENS = gl.constexpr(CHUNK)
STATE_ROWS = gl.constexpr(ROWS)
STATE_PIECE = gl.constexpr(PIECE)
LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _score(
    score_args, REVERSE: gl.constexpr, X_STAGES: gl.constexpr, Y_STAGES: gl.constexpr, P_STAGES: gl.constexpr
):
    """Scores of every chunk, readers by writers: (x y^T) masked to the causal side, decayed and scaled."""
    x_smem, y_smem, p_smem, decays, x_full, x_empty, y_full, y_empty, p_full, p_empty, log2_gamma, scale, count = score_args
    C: gl.constexpr = CHUNK_TOKENS
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    for step in range(count):
        x_stage = step % X_STAGES
        y_stage = step % Y_STAGES
        mbarrier.wait(x_full.index(x_stage), (step // X_STAGES) & 1)
        mbarrier.wait(y_full.index(y_stage), (step // Y_STAGES) & 1)
        scores = gl.zeros([C, C], gl.float32, layout)
        scores = warpgroup_mma(
            x_smem.index(x_stage), y_smem.index(y_stage).permute((1, 0)), scores, use_acc=False, is_async=True
        )
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(x_empty.index(x_stage), count=1)
        mbarrier.arrive(y_empty.index(y_stage), count=1)
        p_stage = step % P_STAGES
        mbarrier.wait(p_empty.index(p_stage), ((step // P_STAGES) & 1) ^ 1)
        # The positions are read from shared memory each time, so that no table of 64 x 64 decays is hoisted out of the
        # loop: its registers are what the mixing warpgroups lack.
        reader = decays.index(4).load(gl.SliceLayout(1, layout))[:, None]
        writer = decays.index(4).load(gl.SliceLayout(0, layout))[None, :]
        distance = writer - reader if REVERSE else reader - writer
        pair = gl.where(distance >= 0, gl.exp2(log2_gamma * gl.maximum(distance, 0.0)) * scale, 0.0)
        p_smem.index(p_stage).store((scores * pair).to(p_smem.dtype))
        fence_async_shared()
        mbarrier.arrive(p_full.index(p_stage), count=1)


@gluon.jit
def _opaque(x):
    """x itself, hidden from the compiler: it would share the rounded state between saving and reading, and keep all of
    it in registers from the one to the other."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def _state_pointers(base, piece, v_first, V: gl.constexpr, layout: gl.constexpr):
    """Pointers to one transposed piece [values, keys] of a [K, V] state."""
    value = v_first + gl.arange(0, STATE_ROWS, gl.SliceLayout(1, layout))
    key = piece * STATE_PIECE + gl.arange(0, STATE_PIECE, gl.SliceLayout(0, layout))
    return base + key[None, :] * V + value[:, None]


@gluon.jit
def _mix(
    mix_args, GROUP: gl.constexpr, V: gl.constexpr, K: gl.constexpr,
    REVERSE: gl.constexpr, READ: gl.constexpr, SAVE_EVERY: gl.constexpr,
    HAS_INITIAL: gl.constexpr, STORE_FINAL: gl.constexpr,
    X_STAGES: gl.constexpr, Y_STAGES: gl.constexpr, Z_STAGES: gl.constexpr, P_STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: outputs and the state of its 64 values, chunk after chunk."""
    (
        x_smem, y_smem, z_smem, p_smem, outs_smem, decays,
        x_full, x_empty, y_full, y_empty, z_full, z_empty, p_full, p_empty,
        out_desc, save_desc, state_in, state_out, save_first,
        batch, head, v_start, first, count, chunks, tail, log2_gamma,
    ) = mix_args  # fmt: skip
    C: gl.constexpr = CHUNK_TOKENS
    R: gl.constexpr = STATE_ROWS
    PIECES: gl.constexpr = K // STATE_PIECE
    IN_FLIGHT: gl.constexpr = 0 if PIECES > 2 else 4
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    dtype: gl.constexpr = z_smem.dtype
    v_first = v_start + GROUP * R
    out_smem = outs_smem.index(GROUP)

    state = ()
    for j in gl.static_range(PIECES):
        if HAS_INITIAL:
            state = state + (gl.load(_state_pointers(state_in, j, v_first, V, layout)),)
        else:
            state = state + (gl.zeros([R, STATE_PIECE], gl.float32, layout),)

    for step in range(count):
        chunk = _chunk_at(step, first, count, REVERSE)
        is_tail = (chunk == chunks - 1).to(gl.int32)
        length = gl.where(chunk == chunks - 1, tail, C)

        if SAVE_EVERY > 0:
            if ((chunk + 1) % SAVE_EVERY == 0 or chunk == chunks - 1) if REVERSE else chunk % SAVE_EVERY == 0:
                for j in gl.static_range(PIECES):
                    tma.store_wait(0)
                    gl.thread_barrier()
                    out_smem.store(_opaque(state[j]).to(dtype))
                    fence_async_shared()
                    gl.thread_barrier()
                    tma.async_copy_shared_to_global(
                        save_desc,
                        [save_first + chunk // SAVE_EVERY, v_first, j * STATE_PIECE],
                        _as_block(out_smem, save_desc),
                    )

        if READ:
            x_stage = step % X_STAGES
            mbarrier.wait(x_full.index(x_stage), (step // X_STAGES) & 1)
            out = gl.zeros([R, C], gl.float32, layout)
            for j in gl.static_range(PIECES):
                piece = gl.convert_layout(state[j].to(dtype), operand, assert_trivial=True)
                readers = x_smem.index(x_stage).slice(j * STATE_PIECE, STATE_PIECE, dim=1).permute((1, 0))
                out = warpgroup_mma(piece, readers, out, use_acc=j > 0, is_async=True)
                if j >= IN_FLIGHT:  # bounds the 16-bit pieces alive, and so the registers
                    out = warpgroup_mma_wait(IN_FLIGHT, deps=(out,))

        y_stage = step % Y_STAGES
        z_stage = step % Z_STAGES
        chunk_decay = gl.exp2(log2_gamma * length.to(gl.float32))
        mbarrier.wait(z_full.index(z_stage), (step // Z_STAGES) & 1)
        values_smem = z_smem.index(z_stage).slice(GROUP * R, R, dim=1).permute((1, 0))

        if READ:
            out = warpgroup_mma_wait(0, deps=(out,))
            mbarrier.arrive(x_empty.index(x_stage), count=1)
            read = decays.index(is_tail * 2).load(gl.SliceLayout(0, layout))
            out = out * read[None, :]
            p_stage = step % P_STAGES
            mbarrier.wait(p_full.index(p_stage), (step // P_STAGES) & 1)
            scores = p_smem.index(p_stage).permute((1, 0))
            out = warpgroup_mma(values_smem, scores, out, is_async=True)

        write = decays.index(is_tail * 2 + 1).load(gl.SliceLayout(0, operand))
        decayed = (values_smem.load(operand).to(gl.float32) * write[None, :]).to(dtype)
        mbarrier.wait(y_full.index(y_stage), (step // Y_STAGES) & 1)
        updated = ()
        for j in gl.static_range(PIECES):
            writers = y_smem.index(y_stage).slice(j * STATE_PIECE, STATE_PIECE, dim=1)
            updated = updated + (warpgroup_mma(decayed, writers, state[j] * chunk_decay, is_async=True),)

        if READ:
            out = warpgroup_mma_wait(PIECES, deps=(out,))
            mbarrier.arrive(p_empty.index(p_stage), count=1)
            tma.store_wait(0)
            gl.thread_barrier()
            out_smem.permute((1, 0)).store(out.to(dtype))
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(out_desc, [batch, chunk * C, head, v_first], _as_block(out_smem, out_desc))

        state = warpgroup_mma_wait(0, deps=updated)
        if PIECES == 1:
            state = (state,)
        mbarrier.arrive(y_empty.index(y_stage), count=1)
        mbarrier.arrive(z_empty.index(z_stage), count=1)

    if STORE_FINAL:
        for j in gl.static_range(PIECES):
            gl.store(_state_pointers(state_out, j, v_first, V, layout), state[j])
    tma.store_wait(0)


@gluon.jit
def _fill_decays(decays, log2_gamma, scale, tail, REVERSE: gl.constexpr):
    """Rows of `decays`: read and write of a full chunk, of the last one, which may be shorter, and the positions.

    Rows past the last token are zero in x, y and z (TMA fills them), so their exponents only have to stay finite.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    token = gl.arange(0, CHUNK_TOKENS, layout)
    begin = gl.exp2(log2_gamma * (token + 1).to(gl.float32)) * scale
    for row in gl.static_range(2):
        length = tail if row == 1 else CHUNK_TOKENS
        end = gl.exp2(log2_gamma * gl.maximum(length - 1 - token, 0).to(gl.float32))
        decays.index(2 * row + (1 if REVERSE else 0)).store(begin)
        decays.index(2 * row + (0 if REVERSE else 1)).store(end)
    decays.index(4).store(token.to(gl.float32))


@gluon.jit
def _init_ring(full, empty, STAGES: gl.constexpr, READERS: gl.constexpr):
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=READERS)


@gluon.jit(do_not_specialize=["tokens", "segments", "segment_chunks"])
def walk_kernel(
    x_desc, y_desc, z_desc, out_desc, save_desc,  # [B, T, H, K] twice, [B, T, H, V] twice, [B H saved, V, K]
    log_decay, scale, state_in, state_out,  # [H], (), [B, H, segments, K, V] twice (float32)
    tokens, heads, segments, segment_chunks,
    K: gl.constexpr, V: gl.constexpr, GROUPS: gl.constexpr,
    REVERSE: gl.constexpr, READ: gl.constexpr, SAVE_EVERY: gl.constexpr,
    HAS_INITIAL: gl.constexpr, STORE_FINAL: gl.constexpr,
    X_STAGES: gl.constexpr, Y_STAGES: gl.constexpr, Z_STAGES: gl.constexpr, P_STAGES: gl.constexpr,
    MIX_REGISTERS: gl.constexpr, SCORE_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid: B * H * segments * (V / (64 GROUPS)) programs; GROUPS warpgroups share a program's x and y tiles."""
    C: gl.constexpr = CHUNK_TOKENS
    dtype: gl.constexpr = z_desc.dtype
    SLICE: gl.constexpr = STATE_ROWS * GROUPS
    program = gl.program_id(0)
    v_start = program % (V // SLICE) * SLICE
    program = program // (V // SLICE)
    segment = program % segments
    row = program // segments
    batch = row // heads
    head = row % heads
    chunks = (tokens + C - 1) // C
    tail = tokens - (chunks - 1) * C
    first = segment * segment_chunks
    count = gl.minimum(chunks - first, segment_chunks)
    log2_gamma = gl.maximum(gl.load(log_decay + head) * LOG2_E, -1e30)  # finite, so that gamma = 0 gives 0^0 = 1
    state_at = program.to(gl.int64) * K * V
    save_first = 0
    if SAVE_EVERY > 0:
        save_first = row * ((chunks + SAVE_EVERY - 1) // SAVE_EVERY)

    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    x_smem = gl.allocate_shared_memory(dtype, [X_STAGES if READ else 1, C, K if READ else 64], wide)
    y_smem = gl.allocate_shared_memory(dtype, [Y_STAGES, C, K], wide)
    z_smem = gl.allocate_shared_memory(dtype, [Z_STAGES, C, SLICE], wide)
    p_smem = gl.allocate_shared_memory(dtype, [P_STAGES, C, C], wide)
    out_smem = gl.allocate_shared_memory(dtype, [GROUPS, C, STATE_ROWS], wide)
    decays = gl.allocate_shared_memory(gl.float32, [5, C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ticket: gl.constexpr = mbarrier.MBarrierLayout()
    x_full = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], ticket)
    x_empty = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], ticket)
    y_full = gl.allocate_shared_memory(gl.int64, [Y_STAGES, 1], ticket)
    y_empty = gl.allocate_shared_memory(gl.int64, [Y_STAGES, 1], ticket)
    z_full = gl.allocate_shared_memory(gl.int64, [Z_STAGES, 1], ticket)
    z_empty = gl.allocate_shared_memory(gl.int64, [Z_STAGES, 1], ticket)
    p_full = gl.allocate_shared_memory(gl.int64, [P_STAGES, 1], ticket)
    p_empty = gl.allocate_shared_memory(gl.int64, [P_STAGES, 1], ticket)
    _init_ring(x_full, x_empty, X_STAGES, GROUPS + 1)
    _init_ring(y_full, y_empty, Y_STAGES, GROUPS + 1 if READ else GROUPS)
    _init_ring(z_full, z_empty, Z_STAGES, GROUPS)
    _init_ring(p_full, p_empty, P_STAGES, GROUPS)
    _fill_decays(decays, log2_gamma, scale, tail, REVERSE)
    fence_async_shared()

    # Constexprs stay inside the calls: assigned to a name they would become run-time scalars.
    load_args = (
        x_desc, y_desc, z_desc, x_smem, y_smem, z_smem, x_full, x_empty, y_full, y_empty, z_full, z_empty,
        batch, head, v_start, first, count,
    )  # fmt: skip
    score_args = (
        x_smem, y_smem, p_smem, decays, x_full, x_empty, y_full, y_empty, p_full, p_empty, log2_gamma, scale, count,
    )  # fmt: skip
    mix_args = (
        x_smem, y_smem, z_smem, p_smem, out_smem, decays,
        x_full, x_empty, y_full, y_empty, z_full, z_empty, p_full, p_empty,
        out_desc, save_desc, state_in + state_at, state_out + state_at, save_first,
        batch, head, v_start, first, count, chunks, tail, log2_gamma,
    )  # fmt: skip
    LOWER: gl.constexpr = 0
    UPPER: gl.constexpr = 1
    if GROUPS == 2 and READ:
        gl.warp_specialize(
            [
                (_mix, (mix_args, LOWER, V, K, REVERSE, READ, SAVE_EVERY, HAS_INITIAL, STORE_FINAL, X_STAGES, Y_STAGES, Z_STAGES, P_STAGES)),
                (_mix, (mix_args, UPPER, V, K, REVERSE, READ, SAVE_EVERY, HAS_INITIAL, STORE_FINAL, X_STAGES, Y_STAGES, Z_STAGES, P_STAGES)),
                (_score, (score_args, REVERSE, X_STAGES, Y_STAGES, P_STAGES)),
                (_load, (load_args, REVERSE, READ, X_STAGES, Y_STAGES, Z_STAGES)),
            ],
            [4, 4, 1],
            [MIX_REGISTERS, SCORE_REGISTERS, LOAD_REGISTERS],
        )
    elif GROUPS == 2:
        gl.warp_specialize(
            [
                (_mix, (mix_args, LOWER, V, K, REVERSE, READ, SAVE_EVERY, HAS_INITIAL, STORE_FINAL, X_STAGES, Y_STAGES, Z_STAGES, P_STAGES)),
                (_mix, (mix_args, UPPER, V, K, REVERSE, READ, SAVE_EVERY, HAS_INITIAL, STORE_FINAL, X_STAGES, Y_STAGES, Z_STAGES, P_STAGES)),
                (_load, (load_args, REVERSE, READ, X_STAGES, Y_STAGES, Z_STAGES)),
            ],
            [4, 1],
            [MIX_REGISTERS, LOAD_REGISTERS],
        )
    elif READ:
        gl.warp_specialize(
            [
                (_mix, (mix_args, LOWER, V, K, REVERSE, READ, SAVE_EVERY, HAS_INITIAL, STORE_FINAL, X_STAGES, Y_STAGES, Z_STAGES, P_STAGES)),
                (_score, (score_args, REVERSE, X_STAGES, Y_STAGES, P_STAGES)),
                (_load, (load_args, REVERSE, READ, X_STAGES, Y_STAGES, Z_STAGES)),
            ],
            [4, 1],
            [SCORE_REGISTERS, LOAD_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_mix, (mix_args, LOWER, V, K, REVERSE, READ, SAVE_EVERY, HAS_INITIAL, STORE_FINAL, X_STAGES, Y_STAGES, Z_STAGES, P_STAGES)),
                (_load, (load_args, REVERSE, READ, X_STAGES, Y_STAGES, Z_STAGES)),
            ],
            [1],
            [LOAD_REGISTERS],
        )
