"""Walks against the float64 oracle: at most twice the error of plain retention in the same dtype."""

import pytest
import torch

pytest.importorskip("triton")

from retnet.kernels.retention.hopper import passes as walk
from retnet.kernels.retention.hopper.launch import _geometry, tma_readable
from retnet.kernels.retention.problem import RetentionProblem
from retnet.ops import reference

CASES = [  # B, T, H, K, V, extras
    (2, 457, 3, 256, 512, "state"),
    (1, 2573, 2, 256, 512, "state"),  # split into parts
    (2, 64, 2, 256, 512, ""),
    (2, 457, 3, 128, 128, "state"),
    (2, 2573, 2, 64, 128, "state"),
    (2, 300, 3, 128, 256, "state"),
    (1, 1, 1, 64, 128, "state"),
    (2, 2560, 2, 64, 128, "state"),  # whole chunks of small heads: dK and dV in one walk
    (3, 192, 5, 64, 64, "state"),
    (8, 128, 16, 64, 128, ""),
    (1, 1500, 3, 256, 128, "state"),
    (1, 1500, 3, 64, 64, "state"),
    (2, 200, 2, 128, 512, ""),
    (2, 457, 3, 256, 512, "state mask"),
    (1, 2573, 2, 256, 512, "state mask"),
    (3, 1300, 1, 64, 128, "state mask"),
    (1, 457, 3, 256, 512, "packed"),
    (1, 2573, 2, 256, 512, "packed"),
    (1, 2000, 2, 128, 128, "packed"),
    (1, 700, 2, 256, 512, "state float16"),
    (1, 2573, 2, 256, 512, "state float16"),
    (2, 2560, 2, 64, 128, "state float16"),
    (3, 457, 5, 128, 128, "float16"),
    (4, 300, 4, 256, 512, "state mask"),  # from here on: narrow tiles on a GPU with 132 multiprocessors
    (1, 700, 16, 256, 512, "packed"),
    (2, 200, 16, 128, 256, "state"),
    (4, 300, 4, 256, 512, "state float16"),
    (2, 457, 3, 256, 512, "token state"),  # from here on: a decay per token
    (1, 2573, 2, 256, 512, "token state"),
    (2, 2573, 3, 256, 512, "token state mask"),
    (3, 457, 5, 128, 128, "token"),
    (2, 2560, 2, 64, 128, "token state"),
    (1, 1500, 3, 64, 64, "token mask"),
    (4, 300, 4, 256, 512, "token state"),
    (1, 1, 3, 64, 128, "token state"),
    (1, 700, 2, 256, 512, "token packed"),
    (1, 2573, 2, 128, 128, "token packed mask"),
    (2, 700, 2, 256, 512, "token extreme"),
    (1, 2573, 3, 64, 128, "token extreme state"),
    (2, 457, 4, 128, 64, "token state groups"),
    (1, 2573, 6, 256, 512, "token mask groups"),
    (1, 1500, 4, 64, 128, "state groups"),
    (1, 1500, 4, 128, 64, "token packed groups"),
]
GROUPED = [
    (2, 457, 4, 128, 64, "token state groups"),
    (1, 2573, 6, 128, 64, "state groups"),
    (2, 300, 8, 256, 512, "groups mask"),
]


def hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


needs_hopper = pytest.mark.skipif(not hopper(), reason="needs a Hopper GPU")


def make(B, T, H, K, V, extras, device="cuda"):
    """The 16-bit inputs of one call, with one decay of 0 (-inf) among three or more heads, and what `extras` names."""
    dtype = torch.float16 if "float16" in extras else torch.bfloat16
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    G = H // 2 if "groups" in extras else H
    q, k = (torch.nn.functional.normalize(normal(B, T, G, K), dim=-1).mul(K**0.25).to(dtype) for _ in range(2))
    v, dout = normal(B, T, H, V).to(dtype), normal(B, T, H, V).to(dtype)
    log_decay = torch.log1p(-(2.0 ** (-5 - torch.arange(H, device=device, dtype=torch.float32))))
    if "token" in extras:
        log_decay = -(torch.rand(B, T, H, generator=generator).to(device) ** 4)
        log_decay[:, ::70, :1] = -50.0
        log_decay[:, T // 2 : T // 2 + 3, -1] = -float("inf")
        if "extreme" in extras:
            kinds = torch.tensor([0.0, -1e-6, -30.0, -torch.inf, -0.1, -0.01, -1e-3, -1.0], device=device)
            log_decay = kinds[torch.randint(0, 8, (B, T, H), generator=generator).to(device)]
    elif H > 2:
        log_decay[-1] = -float("inf")
    state, dfinal = (normal(B, H, K, V), normal(B, H, K, V)) if "state" in extras else (None, None)
    mask = cu = None
    if "mask" in extras:  # padding on the left, masked tokens inside, padding on the right
        mask = torch.ones(B, T, dtype=torch.bool, device=device)
        mask[0, :70] = mask[-1, T // 2 : T // 2 + 9] = mask[-1, -3:] = False
    if "packed" in extras:  # one-token, empty, aligned and long documents
        cu = torch.tensor([0, 5, 5, 64, 192, 300, 301, T - 1, T], device=device)
    return q, k, v, dout, log_decay, state, dfinal, mask, cu


def run(q, k, v, dout, log_decay, state, dfinal, mask, cu):
    problem = RetentionProblem(q, k, v, log_decay, q.shape[-1] ** -0.5, state, mask, cu)
    wanted = {"need_dstate": state is not None, "need_dlog_decay": problem.per_token}
    final_dtype = None if problem.per_token and cu is not None else torch.float32
    assert walk.walk_supported(problem, final=final_dtype is not None)
    assert walk.walk_supported(problem, dfinal, dlog_decay=problem.per_token)
    return by_walks(problem, dout, dfinal, final_dtype, wanted)


def by_walks(problem, dout, dfinal, final_dtype, wanted):
    """Results by name, without those that are None."""
    out, final = walk.walk_forward(problem, final_dtype)
    grads = walk.walk_backward(problem, dout, dfinal, **wanted)
    results = {"out": out, "final": final, **{name: getattr(grads, name) for name in grads.__slots__}}
    return {name: x for name, x in results.items() if x is not None}


def plain(dtype, q, k, v, dout, log_decay, state, dfinal, mask, cu):
    """`reference.parallel` and autograd in `dtype`; no gradient of a fixed decay."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {name: x.detach().to(dtype, copy=True) for name, x in (("dq", q), ("dk", k), ("dv", v))}
    decay = log_decay.to(wide, copy=True)
    start = None if state is None else state.to(wide, copy=True)
    named = {**leaves, **({"dlog_decay": decay} if decay.dim() == 3 else {})}
    named |= {} if start is None else {"dstate": start}
    for leaf in named.values():
        leaf.requires_grad_()
    scale = q.shape[-1] ** -0.5
    out, final = reference.parallel(*leaves.values(), decay, scale=scale, state=start, mask=mask, cu_seqlens=cu)
    loss = (out * dout.to(out.dtype)).double().sum()
    if dfinal is not None:
        loss = loss + (final * dfinal.to(final.dtype)).double().sum()
    grads = torch.autograd.grad(loss, list(named.values()))
    return {"out": out.detach(), "final": final.detach(), **dict(zip(named, grads))}


def error(x, exact):
    return ((x.double() - exact).norm() / exact.norm()).item()


def allowed(low, exact):
    """Twice the error of plain retention. It reads states in float32: with a single token it is exact."""
    return max(2 * error(low, exact), 1e-3)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("case", GROUPED, ids=str)
def test_heads_that_share_queries_and_keys_read_their_group(case):
    q, k, v, _, log_decay, state, _, mask, _ = make(*case)
    problem = RetentionProblem(q, k, v, log_decay, q.shape[-1] ** -0.5, state, mask)
    assert walk.walk_supported(problem)
    out, final = walk.walk_forward(problem, torch.float32)
    expanded = (x.repeat_interleave(v.shape[2] // q.shape[2], 2) for x in (q, k))
    alone = walk.walk_forward(RetentionProblem(*expanded, v, log_decay, problem.scale, state, mask), torch.float32)
    assert torch.equal(out, alone[0])
    assert torch.equal(final, alone[1])


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_are_at_most_twice_those_of_plain_retention_and_runs_are_bit_identical(case):
    inputs = make(*case)
    results, exact, low = run(*inputs), plain(torch.float64, *inputs), plain(inputs[0].dtype, *inputs)
    for name, x in results.items():
        assert error(x, exact[name]) <= allowed(low[name], exact[name]), name
    again = run(*inputs)
    assert all(torch.equal(x, again[name]) for name, x in results.items())


# Sizes (q, k, v, dout, states) at which an unscaled state or its gradient would leave float16's range.
RANGES = {
    "large states": (1e-3, 1, 1, 1e-3, 2e5),
    "large writers": (1e-4, 300, 300, 1e-3, 0),
    "small gradients": (1, 1, 1, 1e-6, 0),
    "small everything": (1, 1e-3, 1e-3, 1e-4, 0),
    "small and large": (100, 1e-3, 300, 1e-6, 0),
}


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("sizes", RANGES.values(), ids=RANGES)
@pytest.mark.parametrize("case", [(1, 2573, 2, 256, 512), (1, 1024, 2, 64, 128)], ids=str)
def test_float16_is_accurate_where_the_state_exceeds_its_range(case, sizes):
    inputs = list(make(*case, "state float16"))
    for i, size in zip((0, 1, 2, 3, 5, 6), (*sizes[:4], sizes[4], min(sizes[4], 1))):
        inputs[i] = inputs[i] * size
    inputs[1][:, 40] *= 8  # a token far above the others
    results, exact, low = run(*inputs), plain(torch.float64, *inputs), plain(torch.float16, *inputs)
    for name, x in results.items():
        by_plain = error(low[name], exact[name])  # NaN where float16 itself overflows
        # Below float16's normal numbers a sum of two halves, rounded apart, is that much coarser.
        allowed = 3 * by_plain if by_plain > 1e-3 else 1e-3
        assert error(x, exact[name]) <= allowed, name


@pytest.mark.gpu
@needs_hopper
def test_nan_in_float16_stays_in_its_head():
    inputs = make(1, 300, 2, 64, 128, "state float16")
    before = run(*inputs)
    inputs[1][:, 50, 0] = torch.nan
    after = run(*inputs)
    assert after["out"][:, 50:, 0].isnan().all()
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(after[name][:, :, 1], before[name][:, :, 1]), name


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("extras", ["packed", "token packed"])
def test_a_document_does_not_see_its_neighbours(extras):
    inputs = list(make(1, 700, 2, 64, 128, extras))
    cu = inputs[-1]
    before = run(*inputs)
    middle = int(cu[4])  # the last token of the document that ends at 192
    for i in range(4):
        inputs[i] = inputs[i].clone()
        inputs[i][:, middle - 1] += 1
    after = run(*inputs)
    for name in {"out", "dq", "dk", "dv", "dlog_decay"} & before.keys():
        changed = (before[name] != after[name]).flatten(2).any(-1)[0].nonzero()[:, 0]
        assert changed.min() >= int(cu[3]), name
        assert changed.max() < middle, name


@pytest.mark.gpu
@needs_hopper
def test_tensors_that_are_slices_of_a_wider_one_are_read_in_place():
    q, k, v, dout, log_decay, state, dfinal, mask, cu = make(2, 200, 2, 64, 128, "state")
    fused = torch.cat([q, k, v], -1)
    views = fused.split([64, 64, 128], -1)
    assert not views[0].is_contiguous()
    together = run(*views, dout, log_decay, state, dfinal, mask, cu)
    apart = run(q, k, v, dout, log_decay, state, dfinal, mask, cu)
    assert all(torch.equal(x, apart[name]) for name, x in together.items())


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("extras", ["", "packed"])
def test_unwanted_states_are_not_computed_and_change_no_other_result(extras):
    q, k, v, dout, log_decay, _, _, mask, cu = make(1, 2573, 2, 256, 512, extras)
    problem = RetentionProblem(q, k, v, log_decay, 1.0, None, mask, cu)
    out, final = walk.walk_forward(problem, None)
    assert final is None
    assert torch.equal(out, walk.walk_forward(problem, torch.float32)[0])
    lean, full = (walk.walk_backward(problem, dout, None, need_dstate=need) for need in (False, not extras))
    assert lean.dstate is None
    assert all(torch.equal(getattr(lean, name), getattr(full, name)) for name in ("dq", "dk", "dv"))


@pytest.mark.gpu
@needs_hopper
def test_a_state_at_an_odd_address_gives_the_same_bits():
    """Code compiled for an aligned state must not be used for an unaligned one."""
    q, k, v, _, log_decay, state, _, _, _ = make(2, 200, 2, 64, 128, "state")
    odd = torch.empty(state.numel() + 1, device="cuda")[1:].view(state.shape).copy_(state)
    for _ in range(2):
        aligned, shifted = (
            walk.walk_forward(RetentionProblem(q, k, v, log_decay, 1.0, x), torch.float32) for x in (state, odd)
        )
        assert all(torch.equal(a, b) for a, b in zip(aligned, shifted))


def test_a_walk_needs_a_hopper_gpu():
    q, k, v, _, log_decay, _, _, _, _ = make(1, 70, 2, 64, 128, "", device="cpu")
    assert not walk.walk_supported(RetentionProblem(q, k, v, log_decay, 1.0))


@pytest.mark.parametrize(
    ("x", "copied"),
    [
        (torch.zeros(2, 5, 3, 64), False),
        (torch.zeros(2, 5, 3, 192).split(64, -1)[1], False),
        (torch.zeros(1, 5, 3, 64).as_strided((1, 5, 3, 64), (7, 192, 64, 1)), False),  # an axis of size 1
        (torch.zeros(1, 5, 3, 64).expand(2, 5, 3, 64), True),
        (torch.zeros(2, 5, 64, 3).mT, True),
        (torch.zeros(2 * 5 * 3 * 64 + 1)[1:].view(2, 5, 3, 64), True),  # contiguous, base off by one element
        (torch.zeros(2, 5, 3, 65)[..., :64], True),
    ],
)
def test_tensors_that_tma_cannot_address_are_copied(x, copied):
    rows = tma_readable(x)
    assert (rows.data_ptr() != x.data_ptr()) == copied
    assert rows.data_ptr() % 16 == 0
    assert all(
        stride > 0 and stride * x.element_size() % 16 == 0 for stride in _geometry(rows.shape, rows.stride())[1][:-1]
    )
    assert rows.stride(-1) == 1
