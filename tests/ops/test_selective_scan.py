import pytest
import torch
from torch import Tensor

from retnet.ops.selective_scan import selective_scan, selective_scan_step


def inputs(T: int = 11, rows: int = 2, sequences: int = 2) -> tuple[Tensor, ...]:
    """x, step, rate, write, read, state: slow and fast decays side by side."""
    torch.manual_seed(0)
    D, N = 3, 4
    x, step = torch.randn(rows, T, D), torch.rand(rows, T, D) + 0.01
    rate = -torch.rand(D, N) * torch.tensor([0.01, 0.1, 1.0, 100.0])
    write, read = torch.randn(rows, T, N), torch.randn(rows, T, N)
    return tuple(z.double() for z in (x, step, rate, write, read, torch.randn(sequences, D, N)))


def by_definition(x, step, rate, write, read, state):
    out = []
    for t in range(x.shape[1]):
        decay = (step[:, t, :, None] * rate).exp()
        state = decay * state + torch.einsum("bd,bn->bdn", step[:, t] * x[:, t], write[:, t])
        out.append(torch.einsum("bdn,bn->bd", state, read[:, t]))
    return torch.stack(out, 1), state


@pytest.mark.parametrize(("chunk_size", "blocks"), [(1, 1), (4, 1), (11, 1), (64, 1), (4, 2), (6, 3), (12, 4), (8, 8)])
def test_outputs_state_and_gradients_equal_the_definition(chunk_size, blocks):
    variables = [z.requires_grad_() for z in inputs(T=24 if blocks > 1 else 11)]
    *tokens, state = variables
    results = selective_scan(*tokens, state=state, chunk_size=chunk_size, blocks=blocks)
    expected = by_definition(*variables)
    weights = [torch.randn_like(z) for z in expected]
    for a, b in zip(results, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    grads, expected_grads = (
        torch.autograd.grad(sum((z * w).sum() for z, w in zip(pair, weights)), variables)
        for pair in (results, expected)
    )
    for a, b in zip(grads, expected_grads):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_gradients_are_right_without_the_final_state():
    tokens = [z.requires_grad_() for z in inputs(T=5)[:5]]
    assert torch.autograd.gradcheck(lambda *z: selective_scan(*z, chunk_size=2)[0], tokens)


def test_packed_sequences_equal_each_sequence_alone():
    *tokens, state = inputs(rows=1, sequences=4)
    rate, bounds = tokens[2], [0, 3, 3, 4, 11]
    y, final = selective_scan(*tokens, state=state, cu_seqlens=torch.tensor(bounds), chunk_size=2)
    for n in range(4):
        x, step, write, read = (z[:, bounds[n] : bounds[n + 1]] for z in (*tokens[:2], *tokens[3:]))
        expected, last = selective_scan(x, step, rate, write, read, state=state[n : n + 1], chunk_size=2)
        assert torch.equal(y[:, bounds[n] : bounds[n + 1]], expected)
        assert torch.equal(final[n : n + 1], last)


def test_one_step_equals_a_scan_of_one_token():
    *tokens, state = inputs(T=1)
    for a, b in zip(selective_scan_step(*tokens, state), selective_scan(*tokens, state=state)):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_half_precision_keeps_a_wide_state():
    *tokens, _ = (z.bfloat16() for z in inputs(T=40))
    y, final = selective_scan(*tokens)
    expected, last = by_definition(*(z.double() for z in tokens), torch.zeros(2, 3, 4, dtype=torch.float64))
    assert y.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    assert (final.double() - last).norm() <= 1e-6 * last.norm()
    assert (y.double() - expected).norm() <= 4e-3 * expected.norm()
