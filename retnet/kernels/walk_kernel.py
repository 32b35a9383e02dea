"""The walk: chunkwise retention with the state in registers, for Hopper (wgmma, TMA, warp specialization).

One program owns a part of a sequence, a head and a slice of the values, and walks it in chunks of 64 tokens. With
readers x, writers y (both [tokens, keys]) and values z it computes, per chunk of L tokens entered with the state S
(paper, Eq. 7, plus the in-chunk decay of the writers that the printed equation leaves out):

    out_r = read_r * x_r S + sum_w pair_rw (x_r . y_w) z_w          S' = gamma^L S + sum_w write_w y_w^T z_w

Forward retention is walk(q, k, v), and the adjoint of retention is retention: `REVERSE` starts at the end of the
sequence, sums over the other side of the diagonal, and the state it carries is then the gradient of the state.

    dV = reverse walk(k, q, dO)        dQ = walk(dO, V, K)        dK = reverse walk(V, dO, Q)

dQ and dK contract over V. Where that is wider than a program holds, `SPLITS` programs take a range of the keys each
and leave partial sums for the caller to add: everything above is linear in the products over keys.

Why it looks so: a state written to memory per chunk moves more bytes than q, k, v and the output together, so it stays
on chip, transposed ([64 values, keys] a warpgroup), which makes it the register operand of the read and the accumulator
of the update: it never passes through shared memory. The warps have roles: one issues the TMA loads, one warpgroup
computes the decayed scores that all values share, one or two warpgroups of 64 values each read, mix and update. Every
decay is the exp of a non-positive difference.

Masked tokens and packed documents (`PLACED`) change the decays of the chunks that hold one and of no other: those
chunks get their factors from `places` (`walk_places`), the others the same ones as without.

Left out: per-token decay, groups of heads, initial states of packed documents (the portable kernels take those).
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

CHUNK = 64  # tokens a step: the rows of one warpgroup instruction, so that scores tile without waste
ROWS = 64  # values a warpgroup holds, likewise
PIECE = 64  # keys of a state piece: only one piece's 16-bit copy is in registers at a time
AHEAD = 1  # chunks whose scores may wait to be read

# Names of Triton 3.6 after those of later versions.
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

_CHUNK = gl.constexpr(CHUNK)
_ROWS = gl.constexpr(ROWS)
_PIECE = gl.constexpr(PIECE)
_AHEAD = gl.constexpr(AHEAD)
_RATE = gl.constexpr(12)  # row of `decays` that repeats log2(gamma)
_SCALE = gl.constexpr(13)
_LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _token_at(step, start, REVERSE: gl.constexpr):
    """First token of a step's chunk, given that of the first step."""
    return start - step * _CHUNK if REVERSE else start + step * _CHUNK


@gluon.constexpr_function
def _first_ticket(ring, x_smem, y_smem):
    """First barrier of rings x, y, z in `tickets`: a `full` one for each slot, then an `empty` one for each.

    All barriers are one allocation (that of the scores comes first), so that a role holds one address of them."""
    return [2 * AHEAD, 2 * AHEAD + 2 * x_smem.shape[0], 2 * AHEAD + 2 * x_smem.shape[0] + 2 * y_smem.shape[0]][ring]


@gluon.jit
def _fetch(desc, at, smem, tickets, FULL: gl.constexpr, step):
    """Wait until the ring's slot of this step is free, then start its load."""
    STAGES: gl.constexpr = smem.shape[0]
    slot = step % STAGES
    mbarrier.wait(tickets.index(FULL + STAGES + slot), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(tickets.index(FULL + slot), desc.block_type.nbytes)
    tile = smem.index(slot).reshape(desc.block_type.shape)
    _tma_load(desc, at, tickets.index(FULL + slot), tile)


@gluon.jit
def _await(smem, tickets, FULL: gl.constexpr, step):
    """The tile of this step, once it is there."""
    STAGES: gl.constexpr = smem.shape[0]
    mbarrier.wait(tickets.index(FULL + step % STAGES), (step // STAGES) & 1)
    return smem.index(step % STAGES)


@gluon.jit
def _release(smem, tickets, FULL: gl.constexpr, step):
    STAGES: gl.constexpr = smem.shape[0]
    mbarrier.arrive(tickets.index(FULL + STAGES + step % STAGES), count=1)


@gluon.jit
def _load(args, REVERSE: gl.constexpr, READ: gl.constexpr):
    """One warp: bring the tiles of every chunk into their rings, in the order in which they are needed."""
    x_desc, y_desc, z_desc, x_smem, y_smem, z_smem, tickets, batch, head, key, value, start, count = args
    X: gl.constexpr = _first_ticket(0, x_smem, y_smem)
    Y: gl.constexpr = _first_ticket(1, x_smem, y_smem)
    Z: gl.constexpr = _first_ticket(2, x_smem, y_smem)
    for step in range(count):
        token = _token_at(step, start, REVERSE)
        if READ:
            _fetch(x_desc, [batch, token, head, key], x_smem, tickets, X, step)
        _fetch(y_desc, [batch, token, head, key], y_smem, tickets, Y, step)
        _fetch(z_desc, [batch, token, head, value], z_smem, tickets, Z, step)


@gluon.jit
def _score(args, REVERSE: gl.constexpr, PLACED: gl.constexpr):
    """One warpgroup: (x y^T) of every chunk, readers by writers, masked to the causal side, decayed and scaled.

    The factors come from shared memory each time: the registers of a table are what the mixing warpgroups lack."""
    x_smem, y_smem, p_smem, pairs, decays, tickets, places, start, count = args
    X: gl.constexpr = _first_ticket(0, x_smem, y_smem)
    Y: gl.constexpr = _first_ticket(1, x_smem, y_smem)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _CHUNK, 16])
    table = pairs.index(0)
    for step in range(count):
        if PLACED:
            chunk_places = places + _token_at(step, start, REVERSE)
            special = _is_special(gl.load(chunk_places))
        x = _await(x_smem, tickets, X, step)
        y = _await(y_smem, tickets, Y, step)
        scores = gl.zeros([_CHUNK, _CHUNK], gl.float32, layout)
        scores = warpgroup_mma(x, y.permute((1, 0)), scores, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        _release(x_smem, tickets, X, step)
        _release(y_smem, tickets, Y, step)
        if PLACED:
            if special != 0:
                _place_pairs(pairs.index(1), decays, chunk_places, REVERSE)
            table = pairs.index(special)
        mbarrier.wait(tickets.index(_AHEAD + step % _AHEAD), ((step // _AHEAD) & 1) ^ 1)
        p_smem.index(step % _AHEAD).store((scores * table.load(layout)).to(p_smem.dtype))
        fence_async_shared()
        mbarrier.arrive(tickets.index(step % _AHEAD), count=1)


@gluon.jit
def _place_pairs(table, decays, places, REVERSE: gl.constexpr):
    """`_make_pairs` for a chunk with masked tokens or a document's border."""
    ROWS: gl.constexpr = 16  # a few at a time, for the sake of registers
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [gl.num_warps(), 1], [1, 0])
    writer = gl.arange(0, _CHUNK, gl.SliceLayout(0, layout))
    log2_gamma = decays.index(_RATE).load(gl.SliceLayout(0, layout))[None, :]
    scale = decays.index(_SCALE).load(gl.SliceLayout(0, layout))[None, :]
    writer = gl.load(places + writer)[None, :]
    for i in gl.static_range(_CHUNK // ROWS):
        reader = i * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        reader = gl.load(places + reader)[:, None]
        distance = _count(writer) - _count(reader) if REVERSE else _count(reader) - _count(writer)
        decay = gl.exp2(log2_gamma * gl.maximum(distance, 0.0)) * scale
        # One document, neither masked. Counts rise with every such token, so they order them.
        related = (_code(reader) == _code(writer)) & (writer >= 0) & (distance >= 0)
        table.slice(i * ROWS, ROWS, dim=0).store(gl.where(related, decay, 0.0))


@gluon.jit
def _is_special(place):
    """Whether a chunk has masked tokens or a document's border; told by any of its places (`walk_places`)."""
    return (place >> 7) & 1


@gluon.jit
def _count(place):
    """Tokens of the chunk through this one, masked ones apart."""
    return (place & 127).to(gl.float32)


@gluon.jit
def _code(place):
    """The document, or its complement for a masked token."""
    return place >> 8


@gluon.jit
def _document(place):
    return (place ^ (place >> 31)) >> 8


@gluon.jit
def _place_decays(decays, ROW: gl.constexpr, places, before, REVERSE: gl.constexpr):
    """Read, write and keep of a special chunk; the state that enters is the one after the token at `before`."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    log2_gamma = decays.index(_RATE).load(layout)
    scale = decays.index(_SCALE).load(layout)
    place = gl.load(places + gl.arange(0, _CHUNK, layout))
    last = gl.load(places + _CHUNK - 1)
    entered = _document(gl.load(before))
    left = _document(last)
    from_start = gl.exp2(log2_gamma * _count(place)) * scale
    from_start = gl.where((place >= 0) & (_document(place) == entered), from_start, 0.0)
    to_end = gl.exp2(log2_gamma * (_count(last) - _count(place)))
    to_end = gl.where((place >= 0) & (_document(place) == left), to_end, 0.0)
    decays.index(ROW).store(to_end if REVERSE else from_start)
    decays.index(ROW + 1).store(from_start if REVERSE else to_end)
    decays.index(ROW + 2).store(gl.where(entered == left, gl.exp2(log2_gamma * _count(last)), 0.0))


@gluon.jit
def _state_pointers(
    base, PIECE_AT: gl.constexpr, GROUP: gl.constexpr, KEY_STRIDE: gl.constexpr, VALUE_STRIDE: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Pointers to one transposed piece [values, keys] of a warpgroup's state."""
    values = GROUP * _ROWS + gl.arange(0, _ROWS, gl.SliceLayout(1, layout))
    keys = PIECE_AT * _PIECE + gl.arange(0, _PIECE, gl.SliceLayout(0, layout))
    return base + keys[None, :] * KEY_STRIDE + values[:, None] * VALUE_STRIDE


@gluon.jit
def _mix(
    args, GROUP: gl.constexpr, REVERSE: gl.constexpr, READ: gl.constexpr, PLACED: gl.constexpr,
    HAS_INITIAL: gl.constexpr, STORE_FINAL: gl.constexpr, KEY_STRIDE: gl.constexpr, VALUE_STRIDE: gl.constexpr,
):  # fmt: skip
    """One warpgroup: outputs and the state of its 64 values, chunk after chunk."""
    (
        x_smem, y_smem, z_smem, p_smem, outs_smem, tickets, decays, out_desc, state_in, state_out,
        out_batch, head, value, start, count, last_step, places,
    ) = args  # fmt: skip
    X: gl.constexpr = _first_ticket(0, x_smem, y_smem)
    Y: gl.constexpr = _first_ticket(1, x_smem, y_smem)
    Z: gl.constexpr = _first_ticket(2, x_smem, y_smem)
    PIECES: gl.constexpr = y_smem.shape[2] // _PIECE
    IN_FLIGHT: gl.constexpr = 0 if PIECES > 2 else 2
    dtype: gl.constexpr = z_smem.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _CHUNK, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    out_smem = outs_smem.index(GROUP)

    state = ()
    for j in gl.static_range(PIECES):
        if HAS_INITIAL:
            pointers = _state_pointers(state_in, j, GROUP, KEY_STRIDE, VALUE_STRIDE, layout)
            state = state + (gl.load(pointers),)
        else:
            state = state + (gl.zeros([_ROWS, _PIECE], gl.float32, layout),)

    for step in range(count):
        token = _token_at(step, start, REVERSE)
        if PLACED:
            special = _is_special(gl.load(places + token))
        if READ:
            x = _await(x_smem, tickets, X, step)
            out = gl.zeros([_ROWS, _CHUNK], gl.float32, layout)
            for j in gl.static_range(PIECES):
                piece = gl.convert_layout(state[j].to(dtype), operand, assert_trivial=True)
                readers = x.slice(j * _PIECE, _PIECE, dim=1).permute((1, 0))
                out = warpgroup_mma(piece, readers, out, use_acc=j > 0, is_async=True)
                if j >= IN_FLIGHT:  # bounds the 16-bit pieces alive, and so the registers
                    out = warpgroup_mma_wait(IN_FLIGHT, deps=(out,))

        z = _await(z_smem, tickets, Z, step).slice(GROUP * _ROWS, _ROWS, dim=1).permute((1, 0))
        if READ:
            out = warpgroup_mma_wait(0, deps=(out,))
            _release(x_smem, tickets, X, step)
        if PLACED:
            if special != 0:
                before = places + gl.maximum(token - 1, 0)
                _place_decays(decays, 6 + 3 * GROUP, places + token, before, REVERSE)
            row = gl.where(special != 0, 6 + 3 * GROUP, 0)
        else:
            row = gl.where(step == last_step, 3, 0)
        if READ:
            out = out * decays.index(row).load(gl.SliceLayout(0, layout))[None, :]
            scores = _await(p_smem, tickets, 0, step).permute((1, 0))
            out = warpgroup_mma(z, scores, out, is_async=True)

        write = decays.index(row + 1).load(gl.SliceLayout(0, operand))
        decayed = (z.load(operand).to(gl.float32) * write[None, :]).to(dtype)
        keep = decays.index(row + 2).load(gl.SliceLayout(1, layout))[:, None]
        y = _await(y_smem, tickets, Y, step)
        updated = ()
        for j in gl.static_range(PIECES):
            writers = y.slice(j * _PIECE, _PIECE, dim=1)
            updated = updated + (warpgroup_mma(decayed, writers, state[j] * keep, is_async=True),)

        if READ:
            out = warpgroup_mma_wait(PIECES, deps=(out,))
            _release(p_smem, tickets, 0, step)
            tma.store_wait(0)
            _barrier()
            out_smem.permute((1, 0)).store(out.to(dtype))
            fence_async_shared()
            _barrier()
            tile = out_smem.reshape(out_desc.block_type.shape)
            _tma_store(out_desc, [out_batch, token, head, value + GROUP * _ROWS], tile)

        state = warpgroup_mma_wait(0, deps=updated)
        if PIECES == 1:
            state = (state,)
        _release(y_smem, tickets, Y, step)
        _release(z_smem, tickets, Z, step)

    if STORE_FINAL:
        for j in gl.static_range(PIECES):
            pointers = _state_pointers(state_out, j, GROUP, KEY_STRIDE, VALUE_STRIDE, layout)
            gl.store(pointers, state[j])
    tma.store_wait(0)


@gluon.jit
def _init_ring(tickets, FULL: gl.constexpr, STAGES: gl.constexpr, READERS: gl.constexpr):
    for stage in gl.static_range(STAGES):
        mbarrier.init(tickets.index(FULL + stage), count=1)
        mbarrier.init(tickets.index(FULL + STAGES + stage), count=READERS)


@gluon.jit
def _make_decays(log2_gamma, scale, tail, REVERSE: gl.constexpr):
    """Rows: read, write and keep of a full chunk, of the last one, room for each warpgroup's special ones; rate, scale.

    The last chunk may be shorter: what TMA brings for its missing rows, zeros or other tokens, is not written.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    decays = gl.allocate_shared_memory(gl.float32, [14, _CHUNK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    token = gl.arange(0, _CHUNK, layout)
    for last in gl.static_range(2):
        length = tail if last == 1 else _CHUNK
        from_start = gl.exp2(log2_gamma * (token + 1).to(gl.float32)) * scale
        to_end = gl.exp2(log2_gamma * gl.maximum(length - 1 - token, 0).to(gl.float32))
        write = gl.where(token < length, from_start if REVERSE else to_end, 0.0)
        decays.index(3 * last + 0).store(to_end if REVERSE else from_start)
        decays.index(3 * last + 1).store(write)
        decays.index(3 * last + 2).store(gl.exp2(log2_gamma * (length + token * 0).to(gl.float32)))
    decays.index(_RATE).store(log2_gamma + token.to(gl.float32) * 0.0)
    decays.index(_SCALE).store(scale + token.to(gl.float32) * 0.0)
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


@gluon.jit(do_not_specialize=["tokens", "batches", "parts", "part_chunks"])
def walk_kernel(
    x_desc, y_desc, z_desc, out_desc,  # [B, T, H, SPLITS * KEYS] twice, [B, T, H, VALUES], [SPLITS * B, T, H, VALUES]
    log_decay, scale, state_in, state_out,  # [H], (), states [B, H, parts, ...] twice (float32)
    places, cu_seqlens,  # [B, chunks * 64] if PLACED, [N + 1] if PER_DOCUMENT (then B = 1, and N stands for it)
    tokens, batches, heads, parts, part_chunks,
    KEYS: gl.constexpr, VALUES: gl.constexpr, SPLITS: gl.constexpr, GROUPS: gl.constexpr,
    KEY_STRIDE: gl.constexpr, VALUE_STRIDE: gl.constexpr,
    REVERSE: gl.constexpr, READ: gl.constexpr, PLACED: gl.constexpr, PER_DOCUMENT: gl.constexpr,
    HAS_INITIAL: gl.constexpr, STORE_FINAL: gl.constexpr,
    X_STAGES: gl.constexpr, Y_STAGES: gl.constexpr, Z_STAGES: gl.constexpr,
    MIX_REGISTERS: gl.constexpr, SCORE_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid: B * H * parts * SPLITS * VALUES / (64 GROUPS) programs; programs that share x and y tiles are neighbours."""
    SLICE: gl.constexpr = _ROWS * GROUPS
    SLICES: gl.constexpr = VALUES // SLICE
    dtype: gl.constexpr = z_desc.dtype
    program = gl.program_id(0)
    value = program % SLICES * SLICE
    split = program // SLICES % SPLITS
    walker = program // (SLICES * SPLITS)
    part = walker % parts
    row = walker // parts
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
    X: gl.constexpr = _first_ticket(0, x_smem, y_smem)
    Y: gl.constexpr = _first_ticket(1, x_smem, y_smem)
    Z: gl.constexpr = _first_ticket(2, x_smem, y_smem)
    tickets = gl.allocate_shared_memory(gl.int64, [Z + 2 * Z_STAGES, 1], mbarrier.MBarrierLayout())
    _init_ring(tickets, 0, _AHEAD, GROUPS)
    _init_ring(tickets, X, x_smem.shape[0], GROUPS + 1)
    _init_ring(tickets, Y, Y_STAGES, GROUPS + 1 if READ else GROUPS)
    _init_ring(tickets, Z, Z_STAGES, GROUPS)
    outs_smem = gl.allocate_shared_memory(dtype, [GROUPS, _CHUNK, _ROWS], wide)
    decays = _make_decays(log2_gamma, scale, tail, REVERSE)
    pairs = _make_pairs(log2_gamma, scale, 2 if PLACED else 1, REVERSE) if READ else decays
    fence_async_shared()

    # Constexprs stay inside the calls: assigned to a name they would become run-time scalars.
    load_args = (x_desc, y_desc, z_desc, x_smem, y_smem, z_smem, tickets, batch, head, key, value, start, count)
    row_places = places + batch * chunks * _CHUNK
    score_args = (x_smem, y_smem, p_smem, pairs, decays, tickets, row_places, start, count)
    mix_args = (
        x_smem, y_smem, z_smem, p_smem, outs_smem, tickets, decays, out_desc, state_in + state_at, state_out + state_at,
        split * batches + batch, head, value, start, count, last_step, row_places,
    )  # fmt: skip
    LOWER: gl.constexpr = 0
    UPPER: gl.constexpr = 1
    if GROUPS == 2 and READ:
        gl.warp_specialize(
            [
                (_mix, (mix_args, LOWER, REVERSE, READ, PLACED, HAS_INITIAL, STORE_FINAL, KEY_STRIDE, VALUE_STRIDE)),
                (_mix, (mix_args, UPPER, REVERSE, READ, PLACED, HAS_INITIAL, STORE_FINAL, KEY_STRIDE, VALUE_STRIDE)),
                (_score, (score_args, REVERSE, PLACED)),
                (_load, (load_args, REVERSE, READ)),
            ],
            [4, 4, 1],
            [MIX_REGISTERS, SCORE_REGISTERS, LOAD_REGISTERS],
        )
    elif GROUPS == 2:
        gl.warp_specialize(
            [
                (_mix, (mix_args, LOWER, REVERSE, READ, PLACED, HAS_INITIAL, STORE_FINAL, KEY_STRIDE, VALUE_STRIDE)),
                (_mix, (mix_args, UPPER, REVERSE, READ, PLACED, HAS_INITIAL, STORE_FINAL, KEY_STRIDE, VALUE_STRIDE)),
                (_load, (load_args, REVERSE, READ)),
            ],
            [4, 1],
            [MIX_REGISTERS, LOAD_REGISTERS],
        )
    elif READ:
        gl.warp_specialize(
            [
                (_mix, (mix_args, LOWER, REVERSE, READ, PLACED, HAS_INITIAL, STORE_FINAL, KEY_STRIDE, VALUE_STRIDE)),
                (_score, (score_args, REVERSE, PLACED)),
                (_load, (load_args, REVERSE, READ)),
            ],
            [4, 1],
            [SCORE_REGISTERS, LOAD_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_mix, (mix_args, LOWER, REVERSE, READ, PLACED, HAS_INITIAL, STORE_FINAL, KEY_STRIDE, VALUE_STRIDE)),
                (_load, (load_args, REVERSE, READ)),
            ],
            [1],
            [LOAD_REGISTERS],
        )
