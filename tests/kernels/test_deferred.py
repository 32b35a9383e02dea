"""Steps with deferred writes against the float64 oracle, through a ring that fills and is folded."""

import pytest
import torch

from retnet.ops import reference

pytest.importorskip("triton")

from retnet.kernels.deferred import retention_defer
from retnet.kernels.step import retention_step


@pytest.mark.parametrize(("B", "G", "H", "K", "V", "masked"), [(2, 1, 2, 32, 48, True), (1, 2, 2, 48, 16, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_deferred_steps_agree_with_the_oracle(B, G, H, K, V, masked, dtype, device):
    W, T, scale = 3, 7, 0.3
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, T, heads, width, device=device).to(dtype) for heads, width in ((G, K), (G, K), (H, V)))
    log_decay = torch.tensor([-0.1, -torch.inf], device=device)
    mask = torch.rand(B, T, device=device) < 0.6 if masked else torch.ones(B, T, dtype=torch.bool, device=device)
    pool = torch.randn(B, 2, H, K, V, device=device)
    state = pool[:, 1]  # a view with strides of its own
    expected, last = reference.recurrent(
        *(x.double() for x in (q, k, v, log_decay)), scale=scale, state=state.double(), mask=mask
    )
    k_rows = torch.full((B, W, G, K), torch.nan, dtype=dtype, device=device)
    v_rows = torch.full((B, W, H, V), torch.nan, dtype=dtype, device=device)
    pending = torch.zeros(B, dtype=torch.int32, device=device)
    kept, others = state.clone(), pool[:, 0].clone()

    def fold():
        waiting = torch.arange(W, device=device) < pending[:, None]
        retention_step(k_rows, k_rows, v_rows, log_decay, state, 1.0, waiting)
        pending.zero_()

    for t in range(T):
        if t % W == 0:
            fold()
            kept.copy_(state)
        one = slice(t, t + 1)
        alive = mask[:, t] if masked else None
        out = retention_defer(q[:, one], k[:, one], v[:, one], log_decay, state, k_rows, v_rows, pending, scale, alive)
        assert torch.equal(state, kept), "the state is only read"
        bound = 2e-6 if dtype == torch.float32 else 1e-3
        assert (out.double() - expected[:, one]).norm() <= bound * expected[:, one].norm().clamp(min=1)
        pending += mask[:, t]
    fold()
    assert (state.double() - last).norm() <= 2e-6 * last.norm()
    assert torch.equal(pool[:, 0], others)
