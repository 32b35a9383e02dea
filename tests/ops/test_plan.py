"""Plans of the operator: forms, backends, and the tokens per chunk on a CPU and on GPUs."""

import pytest
import torch
from torch import Tensor

from retnet import retention, retention_plan
from retnet.ops import plan
from retnet.ops.retention import chunk_tokens


def test_plan_never_replaces_a_forced_mode():
    q, v = torch.zeros(1, 300, 2, 8), torch.zeros(1, 300, 2, 8)
    assert [retention_plan(q, v, mode=mode).mode for mode in ("parallel", "recurrent", "chunkwise")] == [
        "parallel",
        "recurrent",
        "chunkwise",
    ]
    assert retention_plan(q[:, :1], v[:, :1]).mode == "recurrent"
    assert retention_plan(q[:, :20], v[:, :20]).mode == "parallel"
    assert retention_plan(q, v).mode == "chunkwise"
    assert retention_plan(q, v, chunk_size=50).chunk_size == 50


@pytest.mark.parametrize("options", [{}, {"chunk_size": 50}, {"mode": "parallel"}, {"mode": "recurrent"}])
@pytest.mark.parametrize("num_tokens", [1, 40, 300])
def test_chunk_tokens_on_a_cpu_are_those_of_the_plan(num_tokens, options):
    q, v = torch.zeros(1, num_tokens, 2, 8), torch.zeros(1, num_tokens, 2, 16)
    found = chunk_tokens(num_tokens, 8, 16, dtype=torch.float32, device="cpu", **options)
    assert found == retention_plan(q, v, **options).chunk_size


@pytest.mark.parametrize("chunk_size", [1, 5, 64, 1000])
def test_a_cpu_uses_exactly_the_given_chunk_size(chunk_size, monkeypatch):
    from retnet.ops import cpu_chunkwise

    seen = []
    forward = cpu_chunkwise.forward

    def spy(problem, *rest):
        seen.append(problem.chunk_size)
        return forward(problem, *rest)

    monkeypatch.setattr(cpu_chunkwise, "forward", spy)
    x = torch.randn(1, 1200, 1, 8)
    retention(x, x, x, torch.tensor([-0.1]), chunk_size=chunk_size)
    assert seen == [chunk_size]


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks about a GPU that is not there")
def test_without_a_gpu_chunk_tokens_answers_for_an_unknown_one():
    def tokens(**options) -> int:
        return chunk_tokens(5000, 128, 256, dtype=torch.bfloat16, device="cuda", **options)

    assert tokens() == 128
    assert [tokens(chunk_size=size) for size in (1, 64, 90, 128, 200, 10_000)] == [64, 64, 64, 128, 256, 256]
    assert chunk_tokens(5000, 64, 64, dtype=torch.bfloat16, device="cuda", per_token=True) == 64
    assert tokens(mode="recurrent") == 1
    assert tokens(mode="parallel") == 5000
    assert chunk_tokens(1, 128, 256, dtype=torch.bfloat16, device="cuda") == 1


class OnGpu(Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


def test_a_hint_becomes_a_chunk_size_that_the_device_has():
    x = torch.zeros(1, 200, 2, 16)
    assert plan.supported_chunk_size(x, x, False, 100) == 100
    assert plan.supported_chunk_size(x, x, False, None) is None
    if not torch.cuda.is_available():
        assert plan.supported_chunk_size(x.as_subclass(OnGpu), x, False, 100) == 128
        assert plan.supported_chunk_size(x.as_subclass(OnGpu), x, False, None) is None


def test_torch_compile_takes_the_chunk_size_of_a_hint_as_a_constant(monkeypatch):
    def untraceable(*arguments):
        torch._dynamo.graph_break()
        return 128

    monkeypatch.setattr(plan, "_kernel_chunk_tokens", untraceable)

    def sized(x: Tensor) -> Tensor:
        return x * plan.kernel_chunk_tokens(x.device, x.dtype, x.shape[-1], 16, False, False, 100)

    x = torch.ones(3, 16)
    assert torch.equal(torch.compile(sized, fullgraph=True, backend="eager")(x), 128 * x)


@pytest.mark.gpu
def test_a_chunk_size_that_a_gpu_lacks_warns_once_and_a_hint_never():
    from retnet.kernels.retention import dispatch

    def every_way(x: Tensor) -> None:
        retention(x, x, x, decay, chunk_size=plan.supported_chunk_size(x, x, False, 99))
        for _ in range(2):
            retention(x, x, x, decay, chunk_size=100)
        torch.compile(lambda x: retention(x, x, x, decay, chunk_size=100)[0], fullgraph=True)(x)

    dispatch._reported.clear()
    x, decay = torch.randn(1, 300, 2, 32, device="cuda"), torch.tensor([-0.1, -0.01], device="cuda")
    with pytest.warns(UserWarning, match="chunks of 128 tokens instead of chunk_size=100") as warned:
        every_way(x)
    assert sum("instead of chunk_size" in str(warning.message) for warning in warned) == 1
    assert retention_plan(x, x, chunk_size=100).chunk_size == 128
    for dtype in (torch.float32, torch.bfloat16):
        y = x.to(dtype)
        told = chunk_tokens(300, 32, 32, dtype=dtype, device="cuda", chunk_size=100)
        assert told == retention_plan(y, y, chunk_size=100).chunk_size
