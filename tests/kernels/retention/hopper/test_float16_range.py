"""A float16 state times its factor, and what is written to it, stay far from the ends of float16's range."""

import pytest
import torch

from retnet.kernels.retention.hopper.float16_range import state_factors
from retnet.ops import reference

LARGEST = 2.0**14


@pytest.mark.parametrize("k_size", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("v_size", [1e-4, 1.0, 300.0])
@pytest.mark.parametrize("initial_size", [None, 0.0, 1e5])
@pytest.mark.parametrize("same_direction", [False, True])
def test_no_state_leaves_the_range(k_size, v_size, initial_size, same_direction):
    B, T, H, K, V = 2, 300, 3, 16, 32
    k, v = (size * torch.randn(B, T, H, width).half() for size, width in ((k_size, K), (v_size, V)))
    if same_direction:  # every token adds to the same cells: the bound is tight
        k, v = k.abs(), v.abs()
    k[:, 40, 0] *= 8  # each head has its own range
    initial = None if initial_size is None else initial_size * torch.randn(B, H, K, V)
    factors = state_factors(k, v, 1.0, initial)
    assert torch.equal(factors, torch.exp2(factors.log2().round()))
    none_forgets = torch.zeros(H)
    _, final = reference.parallel(*(x.float() for x in (k, k, v)), none_forgets, state=initial)
    for x, heads in ((final, -3), (k, -2), (v, -2)):
        largest = x.float().abs().movedim(heads, 0).flatten(1).amax(1)
        assert (largest * factors <= LARGEST).all()
    if same_direction and initial is None and k_size == v_size == 1:
        assert (final.abs().amax((0, 2, 3)) * factors > LARGEST / 16).all(), "most of the range is used"


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_sequence_that_is_not_finite_does_not_change_the_range_of_the_others(broken):
    k, v = 4 * torch.randn(2, 500, 3, 16).half(), 4 * torch.randn(2, 500, 3, 16).half()
    k[:, :, 0], v[:, :, 0] = 0, 0
    k[1, :, 2] = v[1, :, 2] = 0.01
    whole = state_factors(k, v, 1.0, None)
    k[1, 3, 1, 2] = k[1, 3, 2, 2] = broken
    factors = state_factors(k, v, 1.0, None)
    assert factors.isfinite().all()
    assert torch.equal(factors[0], whole[0])
    assert factors[2] == state_factors(k[:1], v[:1], 1.0, None)[2], "by the sequence that is finite"
    assert (state_factors(k[1:], v[1:], 1.0, None)[1:] == 1).all(), "without a finite sequence the state is not scaled"
