"""The chain of states along a sequence: what each piece adds to the state becomes the state that the piece starts from.

    start_0 = initial,   start_{n+1} = kept_n start_n + own_n

A recurrence is linear in the state it starts from. So the pieces of a sequence (parts of retention, segments of the
selective scan) run at once, each from zeros, and one short loop joins them, forwards or backwards. Each caller has its
own kernel around this loop, since what is kept of a state comes from a different place in each.
"""

import triton
import triton.language as tl


@triton.jit
def chain_states(
    state, states, cell, ok, stride, count, added, LOAD: tl.constexpr, load_args, KEEP: tl.constexpr, keep_args
):  # fmt: skip
    """own_n -> start_n in place, for n < count, from start_0 = `state`; returns the state after the last piece.

    states + cell: what piece 0 adds, with `stride` numbers to the next piece; `ok`: the cells that exist. Only the
    first `added` pieces are read: the rest add nothing. LOAD(n, there, *load_args) loads what kept_n is made of, and
    KEEP(state, loaded, *keep_args) is kept_n state.
    """
    own = tl.load(states + cell, mask=tl.where(added > 0, ok, False), other=0.0)
    loaded = LOAD(0, count > 0, *load_args)
    for n in range(count):
        # Piece n + 1 is loaded before start n is stored: the compiler may not move a load across the store.
        after = states + stride
        next_own = tl.load(after + cell, mask=tl.where(n + 1 < added, ok, False), other=0.0)
        next_loaded = LOAD(n + 1, n + 1 < count, *load_args)
        tl.store(states + cell, state, mask=ok)
        state = KEEP(state, loaded, *keep_args) + own
        states, own, loaded = after, next_own, next_loaded
    return state
