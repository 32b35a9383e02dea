"""Deferred writes on the CPU: steps and folds together are the recurrence."""

import pytest
import torch

from retnet.ops import reference
from retnet.ops.deferred import retention_defer_, retention_fold_


def make(B=2, W=4, G=1, H=2, K=8, V=6, T=9, dtype=torch.float32):
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, T, heads, width, dtype=dtype) for heads, width in ((G, K), (G, K), (H, V)))
    rows = torch.zeros(B, W, G, K, dtype=dtype), torch.zeros(B, W, H, V, dtype=dtype)
    state = torch.randn(B, H, K, V, dtype=torch.promote_types(dtype, torch.float32))
    return q, k, v, torch.tensor([-0.1, -torch.inf], dtype=state.dtype), state, *rows, torch.zeros(B, dtype=torch.int64)


def test_steps_and_folds_are_the_recurrence():
    q, k, v, log_decay, state, k_rows, v_rows, pending = make(dtype=torch.float64)
    mask = torch.tensor([[True] * 9, [True, False, False, True, True, True, False, True, True]])
    expected, last = reference.recurrent(q, k, v, log_decay, scale=0.5, state=state, mask=mask)
    for t in range(9):
        if t % 4 == 0:
            retention_fold_(log_decay, state, k_rows, v_rows, pending)
            pending.zero_()
        one = slice(t, t + 1)
        out = retention_defer_(
            q[:, one], k[:, one], v[:, one], log_decay, state, k_rows, v_rows, pending, scale=0.5, mask=mask[:, one]
        )
        torch.testing.assert_close(out, expected[:, one], rtol=1e-10, atol=1e-10)
        pending += mask[:, t]
    retention_fold_(log_decay, state, k_rows, v_rows, pending)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)


def test_dropping_the_last_rows_is_a_rollback():
    q, k, v, log_decay, state, k_rows, v_rows, pending = make()
    outs = []
    for t in (0, 1, 2):
        outs.append(retention_defer_(q[:, [t]], k[:, [t]], v[:, [t]], log_decay, state, k_rows, v_rows, pending))
        pending += 1
    pending -= 2
    again = retention_defer_(q[:, [1]], k[:, [1]], v[:, [1]], log_decay, state, k_rows, v_rows, pending)
    assert torch.equal(again, outs[1])


def test_the_operator_keeps_torchs_contract():
    q, k, v, *rest = make()
    one = slice(0, 1)
    torch.library.opcheck(torch.ops.retnet.retention_defer_, (q[:, one], k[:, one], v[:, one], *rest, 0.5, None))


def test_what_does_not_fit_is_refused():
    q, k, v, log_decay, state, k_rows, v_rows, pending = make()
    one = slice(0, 1)
    with pytest.raises(ValueError, match="log_decay"):
        retention_defer_(q[:, one], k[:, one], v[:, one], log_decay.expand(2, 1, 2), state, k_rows, v_rows, pending)
    with pytest.raises(ValueError, match="accepted"):
        retention_defer_(q, k, v, log_decay, state, k_rows, v_rows, pending)
    with pytest.raises(TypeError, match="dtypes of k and v"):
        retention_defer_(q[:, one], k[:, one], v[:, one], log_decay, state, k_rows.half(), v_rows, pending)
