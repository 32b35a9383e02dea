"""The roles of a walk's warps (`walk_kernel`): loading tiles, scoring pairs of tokens, mixing values.

Roles hand tiles over in pipelines in shared memory. A pipeline of n stages has 2 n of the `barriers`: for each stage a
`full` one, which its producer opens, and an `empty` one, which all its readers open together.
"""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from retnet.kernels.retention.hopper.borders import multiply_border, store_border

CHUNK = 64  # tokens: the rows of one warpgroup instruction, so that scores fill it
GROUP_VALUES = 64  # values per warpgroup, for the same reason
PIECE = 64  # keys per piece of a state: only one piece has its 16-bit copy in registers at a time
SCORE_STAGES = 1  # stages of the pipeline of scores


@builtin
def _own_tma_add(tensor_desc, coord, src, _semantic=None):
    """`async_atomic_add` of later versions of Triton, which 3.6 can compile but does not name."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


# Later versions of Triton renamed these; the second name is that of 3.6.
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_tma_add = getattr(tma, "async_atomic_add", None) or _own_tma_add

_CHUNK = gl.constexpr(CHUNK)
_GROUP_VALUES = gl.constexpr(GROUP_VALUES)
_PIECE = gl.constexpr(PIECE)
_SCORE_STAGES = gl.constexpr(SCORE_STAGES)
RATE_ROW = gl.constexpr(12)  # row of `decays` that repeats log2(gamma)
SCALE_ROW = gl.constexpr(13)


@gluon.jit
def _token_at(step, start, REVERSE: gl.constexpr):
    """The first token of a step's chunk; `start` is that of the first step."""
    return start - step * _CHUNK if REVERSE else start + step * _CHUNK


@gluon.constexpr_function
def first_barrier(pipeline, x_smem, y_smem):
    """The first barrier of pipeline 0 (x), 1 (y) or 2 (z): the `full` ones of its stages, then the `empty` ones.

    All barriers are one allocation, those of the scores first, so that a role holds a single address."""
    return [
        2 * SCORE_STAGES,
        2 * SCORE_STAGES + 2 * x_smem.shape[0],
        2 * SCORE_STAGES + 2 * x_smem.shape[0] + 2 * y_smem.shape[0],
    ][pipeline]


@gluon.jit
def _fetch(desc, at, smem, barriers, FULL: gl.constexpr, step):
    """Wait until this step's stage of the pipeline is empty, then start its load."""
    STAGES: gl.constexpr = smem.shape[0]
    stage = step % STAGES
    mbarrier.wait(barriers.index(FULL + STAGES + stage), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(barriers.index(FULL + stage), desc.block_type.nbytes)
    tile = smem.index(stage).reshape(desc.block_type.shape)
    _tma_load(desc, at, barriers.index(FULL + stage), tile)


@gluon.jit
def _await(smem, barriers, FULL: gl.constexpr, step):
    """Wait for this step's tile and return it."""
    STAGES: gl.constexpr = smem.shape[0]
    mbarrier.wait(barriers.index(FULL + step % STAGES), (step // STAGES) & 1)
    return smem.index(step % STAGES)


@gluon.jit
def _release(smem, barriers, FULL: gl.constexpr, step):
    STAGES: gl.constexpr = smem.shape[0]
    mbarrier.arrive(barriers.index(FULL + STAGES + step % STAGES), count=1)


@gluon.jit
def load_role(args, REVERSE: gl.constexpr, READ: gl.constexpr):
    """One warp: load the tiles of every chunk into their pipelines, in the order in which they are needed."""
    x_desc, y_desc, z_desc, x_smem, y_smem, z_smem, barriers, batch, xy_head, z_head, key, value, start, count = args
    X: gl.constexpr = first_barrier(0, x_smem, y_smem)
    Y: gl.constexpr = first_barrier(1, x_smem, y_smem)
    Z: gl.constexpr = first_barrier(2, x_smem, y_smem)
    for step in range(count):
        token = _token_at(step, start, REVERSE)
        if READ:
            _fetch(x_desc, [batch, token, xy_head, key], x_smem, barriers, X, step)
        _fetch(y_desc, [batch, token, xy_head, key], y_smem, barriers, Y, step)
        _fetch(z_desc, [batch, token, z_head, value], z_smem, barriers, Z, step)


@gluon.jit
def score_role(args, REVERSE: gl.constexpr, HAS_CODES: gl.constexpr, PER_TOKEN: gl.constexpr):
    """One warpgroup: x y^T of every chunk, readers by writers, on the causal side, decayed and scaled.

    The factors are read from shared memory each time: the mixing warpgroups need the registers of a table."""
    x_smem, y_smem, p_smem, pairs, decays, barriers, codes, sums, start, count = args
    X: gl.constexpr = first_barrier(0, x_smem, y_smem)
    Y: gl.constexpr = first_barrier(1, x_smem, y_smem)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _CHUNK, 16])
    table = pairs.index(0)
    for step in range(count):
        if HAS_CODES:
            chunk_codes = codes + _token_at(step, start, REVERSE)
            special = _is_special(gl.load(chunk_codes))
        x = _await(x_smem, barriers, X, step)
        y = _await(y_smem, barriers, Y, step)
        scores = gl.zeros([_CHUNK, _CHUNK], gl.float32, layout)
        scores = warpgroup_mma(x, y.permute((1, 0)), scores, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        if PER_TOKEN:
            _make_token_pairs(table, decays, sums + _token_at(step, start, REVERSE), REVERSE)
        _release(x_smem, barriers, X, step)
        _release(y_smem, barriers, Y, step)
        if HAS_CODES:
            if special != 0:
                _make_special_pairs(pairs.index(1), decays, chunk_codes, REVERSE)
            table = pairs.index(special)
        mbarrier.wait(barriers.index(_SCORE_STAGES + step % _SCORE_STAGES), ((step // _SCORE_STAGES) & 1) ^ 1)
        p_smem.index(step % _SCORE_STAGES).store((scores * table.load(layout)).to(p_smem.dtype))
        fence_async_shared()
        mbarrier.arrive(barriers.index(step % _SCORE_STAGES), count=1)


@gluon.jit
def _load_token_sums(sums):
    """A chunk's running sums of log2 decays, and its total, as a warpgroup makes its decays of them."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.load(sums + gl.arange(0, _CHUNK, layout)), gl.load(sums + (_CHUNK - 1))


@gluon.jit
def _make_token_decays(decays, ROW: gl.constexpr, through, total, REVERSE: gl.constexpr):
    """Read, write and keep of a chunk, from `_load_token_sums`."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    from_start = gl.exp2(through) * decays.index(SCALE_ROW).load(layout)
    to_end = gl.exp2(total - through)
    decays.index(ROW).store(to_end if REVERSE else from_start)
    decays.index(ROW + 1).store(from_start if REVERSE else to_end)
    decays.index(ROW + 2).store(gl.exp2(total + through * 0.0))


@gluon.jit
def _make_token_pairs(table, decays, sums, REVERSE: gl.constexpr):
    """`_make_pairs` of a chunk, from its running `sums` of log2 decays."""
    ROWS: gl.constexpr = 16  # of the table at a time: registers are few
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [gl.num_warps(), 1], [1, 0])
    writer = gl.arange(0, _CHUNK, gl.SliceLayout(0, layout))
    scale = decays.index(SCALE_ROW).load(gl.SliceLayout(0, layout))[None, :]
    write_sum = gl.load(sums + writer)[None, :]
    writer = writer[None, :]
    for i in gl.static_range(_CHUNK // ROWS):
        reader = i * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        read_sum = gl.load(sums + reader)[:, None]
        reader = reader[:, None]
        if REVERSE:
            decay = gl.where(writer >= reader, gl.exp2(write_sum - read_sum) * scale, 0.0)
        else:
            decay = gl.where(reader >= writer, gl.exp2(read_sum - write_sum) * scale, 0.0)
        table.slice(i * ROWS, ROWS, dim=0).store(decay)


@gluon.jit
def _make_special_pairs(table, decays, codes, REVERSE: gl.constexpr):
    """`_make_pairs` of a special chunk."""
    ROWS: gl.constexpr = 16  # of the table at a time: registers are few
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [gl.num_warps(), 1], [1, 0])
    writer = gl.arange(0, _CHUNK, gl.SliceLayout(0, layout))
    log2_gamma = decays.index(RATE_ROW).load(gl.SliceLayout(0, layout))[None, :]
    scale = decays.index(SCALE_ROW).load(gl.SliceLayout(0, layout))[None, :]
    writer = gl.load(codes + writer)[None, :]
    for i in gl.static_range(_CHUNK // ROWS):
        reader = i * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        reader = gl.load(codes + reader)[:, None]
        distance = _count(writer) - _count(reader) if REVERSE else _count(reader) - _count(writer)
        decay = gl.exp2(log2_gamma * gl.maximum(distance, 0.0)) * scale
        # In one document, neither one masked. Counts rise with every such token, so they give the order.
        related = (_signed_document(reader) == _signed_document(writer)) & (writer >= 0) & (distance >= 0)
        table.slice(i * ROWS, ROWS, dim=0).store(gl.where(related, decay, 0.0))


@gluon.jit
def _is_special(code):
    """Whether the chunk is special, from the code of any of its tokens (`token_codes`)."""
    return (code >> 7) & 1


@gluon.jit
def _count(code):
    """The unmasked tokens of the chunk through this one."""
    return (code & 127).to(gl.float32)


@gluon.jit
def _signed_document(code):
    """The document; its complement for a masked token."""
    return code >> 8


@gluon.jit
def _document(code):
    return (code ^ (code >> 31)) >> 8


@gluon.jit
def _make_special_decays(decays, ROW: gl.constexpr, codes, before, REVERSE: gl.constexpr):
    """Read, write and keep of a special chunk; it is entered with the state after the token whose code is `before`."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    log2_gamma = decays.index(RATE_ROW).load(layout)
    scale = decays.index(SCALE_ROW).load(layout)
    code = gl.load(codes + gl.arange(0, _CHUNK, layout))
    last = gl.load(codes + _CHUNK - 1)
    entered = _document(gl.load(before))
    left = _document(last)
    from_start = gl.exp2(log2_gamma * _count(code)) * scale
    from_start = gl.where((code >= 0) & (_document(code) == entered), from_start, 0.0)
    to_end = gl.exp2(log2_gamma * (_count(last) - _count(code)))
    to_end = gl.where((code >= 0) & (_document(code) == left), to_end, 0.0)
    decays.index(ROW).store(to_end if REVERSE else from_start)
    decays.index(ROW + 1).store(from_start if REVERSE else to_end)
    decays.index(ROW + 2).store(gl.where(entered == left, gl.exp2(log2_gamma * _count(last)), 0.0))


@gluon.jit
def _state_pointers(
    base, PIECE_AT: gl.constexpr, GROUP: gl.constexpr, KEY_STRIDE: gl.constexpr, VALUE_STRIDE: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Pointers to a transposed piece [values, keys] of a warpgroup's state."""
    values = GROUP * _GROUP_VALUES + gl.arange(0, _GROUP_VALUES, gl.SliceLayout(1, layout))
    keys = PIECE_AT * _PIECE + gl.arange(0, _PIECE, gl.SliceLayout(0, layout))
    return base + keys[None, :] * KEY_STRIDE + values[:, None] * VALUE_STRIDE


@gluon.jit
def mix_role(
    args, crossing, GROUP: gl.constexpr, REVERSE: gl.constexpr, READ: gl.constexpr, HAS_CODES: gl.constexpr,
    PER_TOKEN: gl.constexpr, HAS_INITIAL: gl.constexpr, STORE_FINAL: gl.constexpr,
    KEY_STRIDE: gl.constexpr, VALUE_STRIDE: gl.constexpr, ADD: gl.constexpr, TERMS: gl.constexpr,
):  # fmt: skip
    """One warpgroup: the outputs and the state of its 64 values, chunk after chunk. ADD adds to the stored output.

    TERMS > 0: also one of as many terms of what the gradient of log_decay is made of (`decay_gradient.py`): per token
    the inner product of the float32 output with `partner`, and what lies at borders (`borders.py`).
    """
    (
        x_smem, y_smem, z_smem, p_smem, outs_smem, barriers, decays, out_desc, state_in, state_out,
        batch, head, value, start, count, last_step, codes, sums,
    ) = args  # fmt: skip
    X: gl.constexpr = first_barrier(0, x_smem, y_smem)
    Y: gl.constexpr = first_barrier(1, x_smem, y_smem)
    Z: gl.constexpr = first_barrier(2, x_smem, y_smem)
    PIECES: gl.constexpr = y_smem.shape[2] // _PIECE
    IN_FLIGHT: gl.constexpr = 0 if PIECES > 2 else 2
    dtype: gl.constexpr = z_smem.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _CHUNK, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    out_smem = outs_smem.index(GROUP)
    if TERMS > 0:
        partner_desc, dots, borders, products, partner_head, chunks, first_term = crossing
        term = first_term + GROUP
        dots += term * (chunks * _CHUNK) + gl.arange(0, _CHUNK, gl.SliceLayout(0, layout))
        arrived = barriers.index(Z + 2 * z_smem.shape[0] + GROUP)

    state = ()
    for j in gl.static_range(PIECES):
        if HAS_INITIAL:
            pointers = _state_pointers(state_in, j, GROUP, KEY_STRIDE, VALUE_STRIDE, layout)
            state = state + (gl.load(pointers),)
        else:
            state = state + (gl.zeros([_GROUP_VALUES, _PIECE], gl.float32, layout),)

    if PER_TOKEN:
        through, total = _load_token_sums(sums + start)
    for step in range(count):
        token = _token_at(step, start, REVERSE)
        if PER_TOKEN:
            _make_token_decays(decays, 6 + 3 * GROUP, through, total, REVERSE)
            through, total = _load_token_sums(sums + _token_at(gl.minimum(step + 1, count - 1), start, REVERSE))
        if HAS_CODES:
            special = _is_special(gl.load(codes + token))
        if TERMS > 0:
            tma.store_wait(0)
            _barrier()
            mbarrier.expect(arrived, partner_desc.block_type.nbytes)
            place = out_smem.reshape(partner_desc.block_type.shape)  # free until this chunk's output is ready
            _tma_load(partner_desc, [batch, token, partner_head, value + GROUP * _GROUP_VALUES], arrived, place)
            if REVERSE:
                multiply_border(state, borders, products, term, token // _CHUNK, chunks, TERMS, PIECES, layout)
        if READ:
            x = _await(x_smem, barriers, X, step)
            out = gl.zeros([_GROUP_VALUES, _CHUNK], gl.float32, layout)
            for j in gl.static_range(PIECES):
                piece = gl.convert_layout(state[j].to(dtype), operand, assert_trivial=True)
                readers = x.slice(j * _PIECE, _PIECE, dim=1).permute((1, 0))
                out = warpgroup_mma(piece, readers, out, use_acc=j > 0, is_async=True)
                if j >= IN_FLIGHT:  # limits the 16-bit pieces in registers
                    out = warpgroup_mma_wait(IN_FLIGHT, deps=(out,))

        z = _await(z_smem, barriers, Z, step).slice(GROUP * _GROUP_VALUES, _GROUP_VALUES, dim=1).permute((1, 0))
        if READ:
            out = warpgroup_mma_wait(0, deps=(out,))
            _release(x_smem, barriers, X, step)
        if PER_TOKEN:
            row = 6 + 3 * GROUP
        elif HAS_CODES:
            if special != 0:
                before = codes + gl.maximum(token - 1, 0)
                _make_special_decays(decays, 6 + 3 * GROUP, codes + token, before, REVERSE)
            row = gl.where(special != 0, 6 + 3 * GROUP, 0)
        else:
            row = gl.where(step == last_step, 3, 0)
        if READ:
            out = out * decays.index(row).load(gl.SliceLayout(0, layout))[None, :]
            scores = _await(p_smem, barriers, 0, step).permute((1, 0))
            out = warpgroup_mma(z, scores, out, is_async=True)

        write = decays.index(row + 1).load(gl.SliceLayout(0, operand))
        keep = decays.index(row + 2).load(gl.SliceLayout(1, layout))[:, None]
        decayed = (z.load(operand).to(gl.float32) * write[None, :]).to(dtype)
        y = _await(y_smem, barriers, Y, step)
        updated = ()
        for j in gl.static_range(PIECES):
            writers = y.slice(j * _PIECE, _PIECE, dim=1)
            updated = updated + (warpgroup_mma(decayed, writers, state[j] * keep, is_async=True),)

        if READ:
            out = warpgroup_mma_wait(PIECES, deps=(out,))
            _release(p_smem, barriers, 0, step)
            if TERMS > 0:
                mbarrier.wait(arrived, step & 1)
                partner = out_smem.permute((1, 0)).load(layout).to(gl.float32)
                gl.store(dots + token, gl.sum(out * partner, 0))
            else:
                tma.store_wait(0)
            _barrier()
            out_smem.permute((1, 0)).store(out.to(dtype))
            fence_async_shared()
            _barrier()
            tile = out_smem.reshape(out_desc.block_type.shape)
            if ADD:
                _tma_add(out_desc, [batch, token, head, value + GROUP * _GROUP_VALUES], tile)
            else:
                _tma_store(out_desc, [batch, token, head, value + GROUP * _GROUP_VALUES], tile)

        state = warpgroup_mma_wait(0, deps=updated)
        if PIECES == 1:
            state = (state,)
        _release(y_smem, barriers, Y, step)
        _release(z_smem, barriers, Z, step)
        if TERMS > 0 and not REVERSE:
            store_border(state, borders, term, token // _CHUNK, chunks, TERMS, PIECES, dtype, layout)

    if STORE_FINAL:
        for j in gl.static_range(PIECES):
            pointers = _state_pointers(state_out, j, GROUP, KEY_STRIDE, VALUE_STRIDE, layout)
            gl.store(pointers, state[j])
    tma.store_wait(0)
