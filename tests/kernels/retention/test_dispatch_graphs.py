"""Operators on a GPU under torch.compile and in CUDA graphs, and without waiting for the device."""

import pytest
import torch
from torch import Tensor

from retnet import retention, retention_plan, retention_step_

pytestmark = pytest.mark.gpu


def make(B: int = 2, T: int = 130, H: int = 2, K: int = 64, V: int = 128) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(0)
    q, k, v = (
        torch.randn(B, T, H, width, generator=generator, device="cuda", dtype=torch.bfloat16) for width in (K, K, V)
    )
    return q, k, v, torch.log1p(-torch.exp2(-5.0 - torch.arange(H, device="cuda")))


@pytest.mark.parametrize("per_token", [False, True])
def test_compiled_retention_has_no_graph_break_and_the_same_gradients(per_token):
    q, k, v, log_decay = make()
    if per_token:
        log_decay = log_decay.expand(2, 130, 2).contiguous()

    def loss(q, k, v, log_decay):
        out, state = retention(q, k, v, log_decay, mode="chunkwise")
        return out.float().square().sum() + state.square().sum()

    leaves = [x.clone().requires_grad_() for x in (q, k, v, log_decay)]
    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for a, b in zip(eager, compiled):
        assert (a.float() - b.float()).norm() <= 1e-2 * a.float().norm()


@pytest.mark.parametrize("T", [130, 128])  # 128 is whole chunks: dK and dV share a walk
def test_a_captured_forward_and_backward_replays_on_new_inputs(T):
    q, k, v, log_decay = make(T=T)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def run():
        out = retention(*leaves, log_decay, mode="chunkwise")[0]
        return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for leaf in leaves:
            leaf.mul_(0.5)
    graph.replay()
    for a, b in zip(captured, run()):
        assert torch.equal(a, b)


def test_a_captured_step_advances_its_state():
    q, k, v, log_decay = make(T=1)
    state = torch.zeros(2, 2, 64, 128, device="cuda")
    retention_step_(q, k, v, log_decay, state.clone())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = retention_step_(q, k, v, log_decay, state)
    state.zero_()
    expected = torch.zeros_like(state)
    for _ in range(3):
        graph.replay()
        again = retention_step_(q, k, v, log_decay, expected)
    assert torch.equal(state, expected)
    assert torch.equal(out, again)


@pytest.mark.parametrize("packed", [False, True])
def test_nothing_waits_for_the_device(packed):
    q, k, v, log_decay = make(B=1)
    bounds = torch.tensor([0, 50, 130], device="cuda") if packed else None
    leaves = [x.clone().requires_grad_() for x in (q, k, v, log_decay)]

    def run():
        out, state = retention(*leaves, cu_seqlens=bounds, mode="chunkwise")
        torch.autograd.grad((out, state), leaves, (torch.ones_like(out), torch.ones_like(state)))
        retention_step_(q[:, :1], k[:, :1], v[:, :1], log_decay, torch.zeros(1, 2, 64, 128, device="cuda"))

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_one_token_through_retention_is_the_step():
    q, k, v, log_decay = make(T=1)
    state = torch.randn(2, 2, 64, 128, device="cuda")
    kept = state.clone()
    assert retention_plan(q, v).mode == "recurrent"
    out, final = retention(q, k, v, log_decay, state=state)
    assert torch.equal(state, kept)
    assert torch.equal(out, retention_step_(q, k, v, log_decay, kept))
    assert torch.equal(final, kept)


def test_a_plan_reports_the_kernels_that_run():
    q, _, v, _ = make()
    plan = retention_plan(q, v)
    assert (plan.mode, plan.backend) == ("chunkwise", "triton")
    assert plan.chunk_size == plan.detail["chunk"]
    assert retention_plan(q, v, chunk_size=60).chunk_size == 64
    per_token = retention_plan(q, v, per_token=True)
    assert (per_token.detail["kernels"], per_token.chunk_size) == ("portable", 64)
    assert retention_plan(q, v, mode="parallel").backend == "aten"
    assert retention_plan(q[:, :1], v[:, :1]).detail["kernels"] == "step"
    with pytest.raises(ValueError, match="parallel"):
        retention_plan(q, v, mode="parallel", backend="triton")


def test_tuned_shapes_are_stored_and_used(tmp_path, monkeypatch):
    from retnet.kernels.retention import tiles
    from retnet.kernels.retention.tune import tune

    monkeypatch.setenv("RETNET_CACHE", str(tmp_path))
    monkeypatch.setattr("retnet.kernels.retention.tune.SEGMENT_LENGTHS", (64,))
    monkeypatch.setattr(
        "retnet.kernels.retention.tune.state_space", lambda *shape: iter([tiles.StateTile(32, 32, 32, 4, 3)])
    )
    monkeypatch.setattr("retnet.kernels.retention.tune_search.MARGIN", 1000.0)  # whatever was found is taken
    tiles.forget_stored_tiles()
    try:
        tuned = tune(32, 32).tiles
        assert tiles.stored_tiles()[tiles.device_key(torch.device("cuda"), torch.bfloat16, 32, 32)] == tuned
        q, _, v, _ = make(B=200, T=16, K=32, V=32)
        assert retention_plan(q, v).detail["state"]["BT"] == 32
        assert retention_plan(q, v).chunk_size == 64
    finally:
        tiles.forget_stored_tiles()
