"""Eager calls on a GPU, recorded and round the dispatcher: the operator's results, and visible to whoever looks."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from retnet import retention
from retnet.kernels.retention import dispatch
from retnet.ops.selective_scan import selective_scan
from retnet.ops.short_convolution import short_convolution

pytestmark = pytest.mark.gpu


@dataclass(frozen=True)
class Kind:
    B: int = 2
    T: int = 130
    G: int = 2
    H: int = 2
    K: int = 64
    V: int = 128
    per_token: bool = False
    masked: bool = False
    cu: tuple[int, ...] | None = None
    state: bool = False
    learnable: bool = False
    dtype: torch.dtype = torch.bfloat16

    def inputs(self, seed: int) -> tuple[list[Tensor], dict[str, Tensor | None], list[Tensor]]:
        """(q, k, v, log_decay), the other arguments, the leaves."""
        generator = torch.Generator(device="cuda").manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

        B, T, H = self.B, self.T, self.H
        q, k, v = normal(B, T, self.G, self.K), normal(B, T, self.G, self.K), normal(B, T, H, self.V)
        decay = -torch.rand((B, T, H) if self.per_token else (H,), generator=generator, device="cuda")
        N = B if self.cu is None else len(self.cu) - 1
        state = normal(N, H, self.K, self.V, dtype=torch.float32) if self.state else None
        mask = torch.rand(B, T, generator=generator, device="cuda") < 0.7 if self.masked else None
        cu = None if self.cu is None else torch.tensor(self.cu, device="cuda")
        leaves = [x.requires_grad_() for x in (q, k, v, state, decay if self.learnable else None) if x is not None]
        return [q, k, v, decay], {"state": state, "mask": mask, "cu_seqlens": cu}, leaves


KINDS = [
    pytest.param(Kind(), id="walk"),
    pytest.param(Kind(B=8, T=256, H=3, G=3, K=256, V=512), id="walk of wide heads"),
    pytest.param(Kind(B=1, T=2600, K=256, V=512, state=True), id="walk in parts, with a state"),
    pytest.param(Kind(T=256, state=True), id="dk and dv in one walk"),
    pytest.param(Kind(masked=True), id="mask"),
    pytest.param(Kind(B=1, T=700, cu=(0, 5, 5, 64, 300, 700)), id="packed"),
    pytest.param(Kind(dtype=torch.float16, state=True), id="float16"),
    pytest.param(Kind(per_token=True, learnable=True, state=True), id="per token"),
    pytest.param(Kind(per_token=True, learnable=True, G=1, masked=True), id="per token, one group, mask"),
    pytest.param(Kind(learnable=True), id="learnable fixed decay"),
    pytest.param(Kind(B=1, T=300, per_token=True, cu=(0, 1, 200, 300), state=True), id="per token, packed"),
    pytest.param(Kind(dtype=torch.float32, K=48, V=80), id="float32"),
]


def through_the_operator(inputs: list[Tensor], others: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    q, k, v, decay = inputs
    scale = q.shape[-1] ** -0.5
    arguments = q, k, v, decay, scale, others["state"], others["mask"], others["cu_seqlens"], 0
    return torch.ops.retnet.retention(*arguments, "chunkwise", torch.float32, True)


def results(run, inputs, others, leaves) -> list[Tensor]:
    out, final = run(inputs, others)
    weight = torch.linspace(-1, 1, out.shape[1], device=out.device)[None, :, None, None]
    loss = (out.float() * weight).sum() + final.square().sum()
    return [out, final, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("kind", KINDS)
def test_alternating_tensors_of_one_kind_get_their_own_results(kind):
    dispatch.forward_passes.forget(), dispatch.backward_passes.forget()
    cases = [kind.inputs(seed) for seed in range(2)]
    wanted = [[x.clone() for x in results(through_the_operator, *case)] for case in cases]
    dispatch.forward_passes.forget(), dispatch.backward_passes.forget()
    for n in range(6):
        if n == 4:
            torch.cuda.empty_cache()
        found = results(lambda inputs, others: retention(*inputs, mode="chunkwise", **others), *cases[n % 2])
        for a, b in zip(found, wanted[n % 2], strict=True):
            assert torch.equal(a, b)
        del found
    assert any(dispatch.forward_passes._found.values())
    assert any(dispatch.backward_passes._found.values())


def test_convolution_and_scan_replay_on_their_own_tensors():
    generator = torch.Generator(device="cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").requires_grad_()

    for _ in range(6):
        x, weight, bias = normal(2, 70, 96), normal(96, 1, 4), normal(96)
        y, final = short_convolution(x, weight, bias, activation="silu")
        operator = torch.ops.retnet.short_convolution(x, weight, bias, None, None, "silu")
        leaves = (x, weight, bias)
        found = torch.autograd.grad(y.square().sum() + final.sum(), leaves)
        wanted = torch.autograd.grad(operator[0].square().sum() + operator[1].sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip((y, final, *found), (*operator, *wanted), strict=True))
        step, rate = normal(2, 70, 96).exp(), -normal(96, 8).exp()
        tensors = x, step, rate, normal(2, 70, 8), normal(2, 70, 8), normal(2, 96, 8)
        y, final = selective_scan(*tensors[:5], state=tensors[5])
        operator = torch.ops.retnet.selective_scan(*tensors, None)
        found = torch.autograd.grad(y.square().sum() + final.sum(), tensors)
        wanted = torch.autograd.grad(operator[0].square().sum() + operator[1].sum(), tensors)
        assert all(torch.equal(a, b) for a, b in zip((y, final, *found), (*operator[:2], *wanted), strict=True))


def test_calls_on_another_stream_and_in_a_captured_graph_replay_there():
    inputs, others, leaves = Kind().inputs(0)
    wanted = retention(*inputs, **others)[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            found = retention(*inputs, **others)[0]
    side.synchronize()
    assert torch.equal(found, wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            captured = retention(*inputs, **others)[0]
        leaves[2].mul_(2)
        graph.replay()
    assert torch.equal(captured, 2 * wanted)


def test_misaligned_and_strided_inputs_are_kinds_of_their_own():
    (q, k, v, decay), _, _ = Kind().inputs(0)
    with torch.no_grad():
        wanted = retention(q, k, v, decay)[0]
        room = torch.empty(v.numel() + 1, dtype=v.dtype, device="cuda")
        shifted = room[1:].view(v.shape).copy_(v)
        both = torch.cat([q, k], -1)
        for _ in range(4):
            assert torch.equal(retention(q, k, v, decay)[0], wanted)
            assert torch.equal(retention(q, k, shifted, decay)[0], wanted)
            assert torch.equal(retention(*both.chunk(2, -1), v, decay)[0], wanted)


def test_whoever_looks_at_operators_sees_this_one():
    inputs, others, leaves = Kind().inputs(0)
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    for _ in range(3):
        retention(*inputs, **others)
    with Mode():
        out, _ = retention(*inputs, **others)
        torch.autograd.grad(out.sum(), leaves)
    assert "retnet.retention.default" in seen
    assert "retnet.retention_backward.default" in seen
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        retention(*inputs, **others)
    assert "retnet::retention" in {event.key for event in profile.key_averages()}
    compiled = torch.compile(lambda *x: retention(*x)[0] * 2, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), retention(*inputs)[0] * 2)
    batched = torch.func.vmap(lambda q: retention(q[None], *(x[:1] for x in inputs[1:3]), inputs[3])[0][0])(inputs[0])
    torch.testing.assert_close(batched[0], retention(*inputs)[0][0], rtol=2e-2, atol=2e-2)


def test_gradients_of_gradients_after_recorded_calls():
    inputs, others, leaves = Kind(T=20, dtype=torch.float32, K=16, V=16).inputs(0)

    def penalty() -> list[Tensor]:
        out = retention(*inputs, **others)[0]
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))

    for _ in range(3):
        torch.autograd.grad(retention(*inputs, **others)[0].sum(), leaves)
    for a, b in zip(penalty(), penalty()):
        assert torch.equal(a, b)
