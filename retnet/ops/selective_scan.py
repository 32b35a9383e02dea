"""The selective scan of Mamba (Gu & Dao 2023, arXiv 2312.00752, Eq. 2 and Algorithm 2), with a state and a backward.

    h_t = exp(step_t rate) h_{t-1} + (step_t x_t) write_t^T        y_t = h_t read_t

A channel d has N states, each with a decay of its own: step [D] times rate [D, N] (the paper's Delta and A; write and
read are its B and C). Matrix products cannot do that chunk by chunk, as they can with retention's one decay a head, so
tokens are read one after another. All else is vectorised: [B, C, D, N] tensors exist for one chunk of C tokens at a
time, in the backward too, which keeps the state at the start of each chunk and computes the rest again.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from retnet.ops.ragged import equal_blocks

CHUNK_SIZE = 32  # measured on a CPU: larger chunks leave its cache


def selective_scan(
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    write: Tensor,
    read: Tensor,
    *,
    state: Tensor | None = None,
    bounds: list[int] | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """Scan T tokens.

    Args:
        x, step: [B, T, D] inputs and time steps (> 0).
        rate: [D, N], < 0.
        write, read: [B, T, N].
        state: [S, D, N] before the first token (zeros if None); S = B, or the number of packed sequences.
        bounds: of the sequences packed into one row (B = 1): 0, ..., T.
        chunk_size: tokens whose states are held at a time; changes memory, not the result.

    Returns y [B, T, D] in x's dtype, and the state [S, D, N] after the last token in float32 (float64 for float64).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    num_sequences = x.shape[0] if bounds is None else len(bounds) - 1
    if state is None:
        state = x.new_zeros(num_sequences, x.shape[2], rate.shape[1], dtype=wide)
    tokens, rate, state = [z.to(wide) for z in (x, step, write, read)], rate.to(wide), state.to(wide)
    outs, finals = [tokens[0][:, :0]], [state[:0]]
    for rows, span, sequences in equal_blocks(x.shape[0], x.shape[1], bounds):
        u, dt, w, r = (z[rows, span] for z in tokens)
        y, final = _SelectiveScan.apply(u, dt, rate, w, r, state[sequences], chunk_size)
        outs.append(y)
        finals.append(final)
    return torch.cat(outs, 1).to(x.dtype), torch.cat(finals)


def selective_scan_step(
    x: Tensor, step: Tensor, rate: Tensor, write: Tensor, read: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: x, step [B, 1, D], write, read [B, 1, N], state [B, D, N] -> (y [B, 1, D], the new state)."""
    decay = (step[:, 0, :, None].to(state.dtype) * rate.to(state.dtype)).exp()
    new = decay * state + (step * x)[:, 0, :, None].to(state.dtype) * write.to(state.dtype)
    return torch.matmul(new, read[:, 0, :, None].to(state.dtype))[:, None, :, 0].to(x.dtype), new


def _decay_and_states(x: Tensor, step: Tensor, rate: Tensor, write: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Decays and states [B, C, D, N] of the tokens of one chunk."""
    decay = torch.mul(step[..., None], rate).exp_()
    states = (step * x)[..., None] * write[:, :, None]
    before = start
    for t in range(x.shape[1]):
        before = states[:, t].addcmul_(decay[:, t], before)
    return decay, states


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, step, rate, write, read, state, chunk_size):
        starts, outs = [state], []
        for begin in range(0, x.shape[1], chunk_size):
            c = slice(begin, begin + chunk_size)
            _, states = _decay_and_states(x[:, c], step[:, c], rate, write[:, c], starts[-1])
            outs.append(torch.matmul(states, read[:, c, :, None])[..., 0])
            starts.append(states[:, -1].clone())
        ctx.save_for_backward(x, step, rate, write, read, *starts[:-1])
        ctx.chunk_size = chunk_size
        return torch.cat(outs, 1) if outs else torch.zeros_like(x), starts[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):
        x, step, rate, write, read, *starts = ctx.saved_tensors
        dx, dstep, dwrite, dread = (torch.empty_like(z) for z in (x, step, write, read))
        drate = torch.zeros_like(rate)
        # What the token before receives from the state after it, and from the last one on from outside.
        carried = dfinal
        for n in reversed(range(len(starts))):
            c = slice(n * ctx.chunk_size, (n + 1) * ctx.chunk_size)
            decay, states = _decay_and_states(x[:, c], step[:, c], rate, write[:, c], starts[n])
            dread[:, c] = torch.matmul(dy[:, c, None], states)[:, :, 0]
            dstates = dy[:, c, :, None] * read[:, c, None]
            for t in reversed(range(dstates.shape[1])):
                dstates[:, t] += carried
                carried = dstates[:, t] * decay[:, t]
            dwrite[:, c] = torch.matmul((step * x)[:, c, None], dstates)[:, :, 0]
            dinput = torch.matmul(dstates, write[:, c, :, None])[..., 0]
            # d log decay = dstates * decay * (the state before)
            before = torch.cat([starts[n][:, None], states[:, :-1]], 1)
            dlog = dstates.mul_(decay).mul_(before)
            dstep[:, c] = dinput * x[:, c] + (dlog * rate).sum(-1)
            dx[:, c] = dinput * step[:, c]
            drate += torch.einsum("bcdn,bcd->dn", dlog, step[:, c])
        return dx, dstep, drate, dwrite, dread, carried, None
