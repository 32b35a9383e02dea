"""Deferred writes: steps that keep tokens in a ring give the same outputs as steps that write every token."""

import torch

from retnet.ops.decode.ring import Ring, ring_step

B, H, G, W, K, V = 3, 4, 2, 4, 3, 5


def make_ring() -> Ring:
    """A ring without pending tokens, whose memory holds NaN."""
    return Ring(*(torch.full(size, torch.nan, dtype=torch.float64) for size in ((B, G, W, K), (B, G, W, V), (B, H, W))),
                torch.zeros(B, dtype=torch.long))  # fmt: skip


def test_steps_with_a_ring_compute_the_recurrence_and_resets():
    generator = torch.Generator().manual_seed(0)
    ring, state = make_ring(), torch.randn(B, H, K, V, generator=generator, dtype=torch.float64)
    expected = state.clone()
    for step in range(3 * W):
        q, k, v, log_decay = (
            torch.randn(*size, generator=generator, dtype=torch.float64)
            for size in ((B, H, K), (B, G, K), (B, G, V), (B, H))
        )
        keys, values = (x.repeat_interleave(H // G, 1) for x in (k, v))
        log_decay = -log_decay.abs()
        if step % 5 == 3:
            log_decay[1] = -torch.inf
        active = torch.tensor([True, step % 3 != 1, step % 4 != 2])
        update = expected * log_decay.exp()[..., None, None] + keys[..., None] * values[..., None, :]
        expected = torch.where(active[:, None, None, None], update, expected)
        out = ring_step(q, k, v, log_decay, state, active, ring)
        read = (q[..., None, :] @ expected)[..., 0, :]
        torch.testing.assert_close(out, read * active[:, None, None])
        ring.pending.add_(active).remainder_(W)
        torch.testing.assert_close(ring.folded(state), expected)


def test_the_size_of_a_ring_is_that_of_its_tokens():
    ring = make_ring()
    assert ring.nbytes == sum(x.nbytes for x in (ring.keys, ring.values, ring.log_decay))
    assert ring.slot(2).nbytes * B == ring.nbytes
