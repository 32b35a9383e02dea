"""Recurrent kernels against the float64 oracle, and the rounding of narrow states."""

import pytest
import torch

from retnet.kernels.retention.problem import RetentionProblem
from retnet.ops import reference

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("B", "T", "G", "H", "K", "V", "per_token", "masked"),
    [(2, 1, 1, 2, 32, 48, False, False), (2, 3, 2, 2, 32, 16, True, True), (1, 2, 1, 1, 48, 16, False, True)],
)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16], ids=str)
def test_steps_agree_with_the_oracle(B, T, G, H, K, V, per_token, masked, state_dtype, device):
    from retnet.kernels.decode.recurrent import retention_step

    torch.manual_seed(0)
    q, k, v = (torch.randn(B, T, heads, width, device=device) for heads, width in ((G, K), (G, K), (H, V)))
    log_decay = -torch.rand(B, T, H, device=device) if per_token else -torch.rand(H, device=device)
    if per_token:
        log_decay[0, 0, 0] = -torch.inf
    mask = torch.tensor([[False, True, True], [True, True, False]], device=device)[:B, :T] if masked else None
    state = torch.randn(B, H, K, V, device=device).to(state_dtype)
    expected, last = reference.recurrent(
        *(x.double() for x in (q, k, v, log_decay)), scale=0.3, state=state.double(), mask=mask
    )
    out = retention_step(RetentionProblem(q, k, v, log_decay, 0.3, mask=mask), state)
    assert (out.double() - expected).norm() <= 2e-6 * expected.norm()
    assert (state.double() - last).norm() <= (2e-6 if state_dtype == torch.float32 else 1e-3) * last.norm()


@pytest.mark.slow
def test_thousands_of_slow_decays_keep_float32_accuracy(device):
    """Each rounding of exp(log_decay) goes to the same side: multiplied 4096 times, it is 2e-5 off."""
    from retnet.kernels.decode.recurrent import retention_step

    torch.manual_seed(0)
    T = 4096
    q, k, v = (torch.randn(1, T, 1, 16, device=device) for _ in range(3))
    log_decay = torch.log1p(-torch.exp2(torch.tensor([-12.3], device=device)))
    state = torch.randn(1, 1, 16, 16, device=device)
    expected, last = reference.chunkwise(
        *(x.double() for x in (q, k, v, log_decay)), scale=0.3, state=state.double(), chunk_size=256
    )
    out = retention_step(RetentionProblem(q, k, v, log_decay, 0.3), state)
    assert (out.double() - expected).norm() <= 2e-6 * expected.norm()
    assert (state.double() - last).norm() <= 2e-6 * last.norm()


def test_a_narrow_state_forgets_at_the_rate_of_its_decay(device):
    """Rounded to nearest, float16 would keep a state forever under a decay of 1 - 2^-13."""
    from retnet.kernels.decode.recurrent import retention_step

    torch.manual_seed(0)
    state = (1 + torch.rand(1, 1, 16, 16, device=device)).half()
    before, decay, steps = state.double().sum(), 1 - 2.0**-13, 200
    silent = torch.zeros(1, 1, 1, 16, device=device)
    for step in range(steps):
        q = torch.full((1, 1, 1, 16), float(step), device=device)
        retention_step(RetentionProblem(q, silent, silent, torch.tensor([decay], device=device).log(), 1.0), state)
    lost = 1 - state.double().sum() / before
    assert abs(lost - (1 - decay**steps)) < 0.2 * (1 - decay**steps)


def test_a_state_that_cannot_be_updated_in_place_is_refused(device):
    from retnet.kernels.decode.recurrent import retention_step

    x = torch.zeros(1, 1, 1, 16, device=device)
    problem = RetentionProblem(x, x, x, torch.zeros(1, device=device), 1.0)
    with pytest.raises(ValueError, match="contiguous"):
        retention_step(problem, torch.zeros(1, 1, 16, 16, device=device).mT)
    with pytest.raises(TypeError, match="float64"):
        retention_step(problem, torch.zeros(1, 1, 16, 16, device=device).double())


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_strided_state_of_a_pool_is_updated_in_place(state_dtype, device):
    from retnet.kernels.decode.recurrent import retention_step

    torch.manual_seed(0)
    pool = torch.randn(6, 16, 256, 512, device=device).to(state_dtype)
    kept = pool.clone()
    q, k, v = (torch.randn(3, 1, 16, width, device=device, dtype=torch.bfloat16) for width in (256, 256, 512))
    log_decay = torch.log1p(-torch.exp2(-5.0 - torch.arange(16, device=device)))
    expected, last = reference.recurrent(
        *(x.double() for x in (q, k, v, log_decay)), scale=1.0, state=pool[::2].double()
    )
    out = retention_step(RetentionProblem(q, k, v, log_decay, 1.0), pool[::2])
    assert torch.equal(pool[1::2], kept[1::2])
    assert (out.double() - expected).norm() <= 4e-3 * expected.norm()
    assert (pool[::2].double() - last).norm() <= (2e-6 if state_dtype == torch.float32 else 6e-3) * last.norm()


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_state_is_rounded_after_it_is_read(state_dtype, device):
    from retnet.kernels.decode.recurrent import retention_recurrent

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 1, 2, 16, device=device) for _ in range(3))
    log_decay = torch.tensor([-0.1, -0.2], device=device)
    state = 1e5 * torch.randn(2, 2, 16, 16, device=device)  # beyond float16
    expected, _ = reference.recurrent(*(x.double() for x in (q, k, v, log_decay)), scale=0.3, state=state.double())
    out, final = retention_recurrent(RetentionProblem(q, k, v, log_decay, 0.3, state), state_dtype)
    assert final.dtype == state_dtype
    assert (out.double() - expected).norm() <= 2e-6 * expected.norm()


def test_a_state_shared_by_sequences_is_refused(device):
    from retnet.kernels.decode.recurrent import retention_step

    q = torch.randn(2, 1, 1, 16, device=device)
    state = torch.zeros(1, 1, 16, 16, device=device).expand(2, 1, 16, 16)
    with pytest.raises(ValueError, match=r"state has strides \(0, 256, 16, 1\); accepted: .* and its own"):
        retention_step(RetentionProblem(q, q, q, torch.zeros(1, device=device), 1.0), state)
    odd = torch.zeros(256, device=device).as_strided((1, 1, 16, 16), (0, 7, 16, 1))
    problem = RetentionProblem(q[:1], q[:1], q[:1], torch.zeros(1, device=device), 1.0)
    assert retention_step(problem, odd).isfinite().all()
