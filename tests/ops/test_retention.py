"""Retention against the oracle: all forms and arguments; outputs, states and gradients."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retnet import retention, retention_step_
from retnet.kernels.retention.problem import RetentionProblem
from retnet.ops import cpu_chunkwise, reference

from .conftest import make_problem, relative_error

FORMS = {
    "parallel": {"mode": "parallel"},
    "recurrent": {"mode": "recurrent"},
    "chunkwise": {"mode": "chunkwise", "chunk_size": 7},
    "chunkwise of one token": {"mode": "chunkwise", "chunk_size": 1},
    "default": {},
    "aten": {"backend": "aten", "mode": "chunkwise", "chunk_size": 16},
}

problems = st.builds(
    lambda heads, **sizes: make_problem(H=heads[0], G=heads[1], **sizes),
    heads=st.sampled_from([(1, 1), (2, 2), (3, 1), (4, 2)]),
    B=st.integers(1, 3),
    T=st.sampled_from([0, 1, 2, 3, 7, 13, 31, 37]),
    K=st.sampled_from([1, 2, 5, 8]),
    V=st.sampled_from([1, 3, 8, 11]),
    per_token=st.booleans(),
    resets=st.booleans(),
    holes=st.booleans(),
    packed=st.booleans(),
    fastest=st.sampled_from([0.1, 3.0, 100.0]),
    seed=st.integers(0, 2**31),
)


@settings(max_examples=60, deadline=None)
@given(problem=problems, form=st.sampled_from(sorted(FORMS)))
def test_every_form_equals_the_definition_in_float64(problem, form):
    expected = problem.solve(reference.recurrent)
    for name, x in problem.solve(retention, **FORMS[form]).items():
        assert relative_error(x, expected[name]) < 1e-10, name


@settings(max_examples=60, deadline=None)
@given(problem=problems, form=st.sampled_from(sorted(FORMS)))
def test_every_form_in_float32_equals_the_definition_within_rounding(problem, form):
    rounded = problem.to(torch.float32)
    expected = rounded.to(torch.float64).solve(reference.recurrent)
    summands = _norm_of_dlog_summands(rounded)
    for name, x in rounded.solve(retention, **FORMS[form]).items():
        if name == "dlog_decay":
            assert (x - expected[name]).norm().item() <= 2e-5 * summands + 1e-30
        else:
            assert relative_error(x, expected[name]) < 2e-6, name


def _norm_of_dlog_summands(problem) -> float:
    """Norm of the gradient of log_decay computed from the magnitudes of its products."""
    positive = problem.to(torch.float64)
    for name in ("q", "k", "v", "state", "dout", "dstate"):
        setattr(positive, name, getattr(positive, name).abs())
    return positive.solve(reference.recurrent)["dlog_decay"].norm().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["parallel", "recurrent", "chunkwise"])
def test_half_precision_has_at_most_twice_the_error_of_torch(dtype, form):
    problem = make_problem(2, 200, 2, 4, 32, 24, fastest=0.1, seed=1).to(dtype)
    expected = problem.to(torch.float64).solve(reference.recurrent)
    torchs = problem.solve(reference.parallel)
    for name, x in problem.solve(retention, mode=form).items():
        assert relative_error(x, expected[name]) <= 2 * relative_error(torchs[name], expected[name]) + 1e-7, name


def test_long_sequences_stay_accurate_in_float32():
    problem = make_problem(1, 6007, 1, 2, 16, 24, fastest=1e-3, seed=2).to(torch.float32)
    expected = problem.to(torch.float64).solve(reference.chunkwise, chunk_size=64)
    for name, x in problem.solve(retention).items():
        assert relative_error(x, expected[name]) < (2e-5 if name == "dlog_decay" else 2e-6), name


@pytest.mark.parametrize("per_token", [False, True])
def test_hard_resets_between_slow_decays_cost_no_precision(per_token):
    problem = make_problem(1, 150, 1, 3, 8, 8, per_token=per_token, seed=3)
    values = torch.tensor([-1000.0, -20.0, -0.01, -torch.inf]).double()
    picks = torch.randint(4, problem.log_decay.shape, generator=torch.Generator().manual_seed(0))
    problem.log_decay = values[picks]
    expected = problem.solve(reference.recurrent)
    for form in ("parallel", "chunkwise"):
        for name, x in problem.solve(retention, mode=form).items():
            assert relative_error(x, expected[name]) < 1e-10, (form, name)


@pytest.mark.parametrize("form", ["parallel", "recurrent", "chunkwise"])
def test_packed_documents_do_not_leak(form):
    problem = make_problem(1, 90, 2, 4, 8, 8, packed=True, seed=5)
    problem.cu_seqlens = torch.tensor([0, 31, 31, 60, 90])
    before = problem.solve(retention, mode=form)
    for name in ("q", "k", "v", "dout"):
        getattr(problem, name)[:, 59] = 7.0
    after = problem.solve(retention, mode=form)
    for name in ("out", "dq", "dk", "dv"):
        others = torch.arange(90).lt(31) | torch.arange(90).ge(60)
        assert torch.equal(before[name][:, others], after[name][:, others]), name
    for name in ("final", "dstate"):
        assert torch.equal(before[name][[0, 1, 3]], after[name][[0, 1, 3]]), name
    assert not torch.equal(before["out"][:, 59], after["out"][:, 59])


@pytest.mark.parametrize("holes", ["left", "right", "anywhere"])
@pytest.mark.parametrize("form", ["parallel", "recurrent", "chunkwise"])
def test_masked_tokens_change_nothing_for_the_others(holes, form):
    problem = make_problem(2, 40, 1, 2, 8, 8, seed=6)
    t = torch.arange(40)
    problem.mask = {"left": t >= 9, "right": t < 31, "anywhere": t % 3 != 1}[holes].expand(2, 40)
    result = problem.solve(retention, mode=form)
    for name in ("q", "k", "v"):
        getattr(problem, name)[~problem.mask] = torch.nan
    poisoned = problem.solve(retention, mode=form)
    for name in ("out", "final"):
        assert torch.equal(result[name], poisoned[name]), name
    assert (result["out"][~problem.mask] == 0).all()
    kept = make_problem(2, 40, 1, 2, 8, 8, seed=6)
    for name in ("q", "k", "v", "dout"):
        setattr(kept, name, getattr(kept, name)[:, problem.mask[0]])
    expected = kept.solve(reference.parallel)
    assert relative_error(result["out"][:, problem.mask[0]], expected["out"]) < 1e-12
    assert relative_error(result["final"], expected["final"]) < 1e-12


@pytest.mark.parametrize("mode", ["parallel", "recurrent", "chunkwise"])
def test_return_state_false_changes_neither_outputs_nor_gradients(mode):
    p = make_problem(2, 20, 1, 2, 8, 8, holes=True, seed=17)
    p.dstate.zero_()
    expected = p.solve(retention, mode=mode, chunk_size=8)

    def without(*args, **options):
        out, state = retention(*args, mode=mode, chunk_size=8, return_state=False, **options)
        assert state is None
        return out, torch.zeros_like(p.dstate)

    for name, x in p.solve(without).items():
        assert name == "final" or torch.equal(x, expected[name]), name


def test_splitting_a_sequence_anywhere_changes_nothing():
    p = make_problem(2, 50, 2, 4, 8, 8, seed=7)
    whole, final = retention(p.q, p.k, p.v, p.log_decay, state=p.state)
    parts, state = [], p.state
    for start, end in ((0, 17), (17, 18), (18, 18), (18, 50)):
        one = slice(start, end)
        out, state = retention(p.q[:, one], p.k[:, one], p.v[:, one], p.log_decay, state=state)
        parts.append(out)
    assert relative_error(torch.cat(parts, 1), whole) < 1e-13
    assert relative_error(state, final) < 1e-13


def test_a_step_updates_the_state_in_place_and_retention_does_not():
    p = make_problem(2, 5, 2, 4, 8, 8, holes=True, seed=8)
    given, state = p.state.clone(), p.state.clone()
    out, final = retention(p.q, p.k, p.v, p.log_decay, state=given, mask=p.mask)
    assert torch.equal(given, p.state)
    stepped = retention_step_(p.q, p.k, p.v, p.log_decay, state, mask=p.mask)
    assert relative_error(stepped, out) < 1e-13
    assert relative_error(state, final) < 1e-13


def test_a_narrower_state_is_rounded_once_per_call():
    p = make_problem(1, 3, 1, 2, 8, 8, seed=9).to(torch.float32)
    _, final = retention(p.q, p.k, p.v, p.log_decay, state=p.state.bfloat16(), state_dtype=torch.bfloat16)
    state = p.state.bfloat16()
    retention_step_(p.q, p.k, p.v, p.log_decay, state)
    assert final.dtype == torch.bfloat16
    assert relative_error(state, final) < 5e-3


@pytest.mark.parametrize("mode", ["parallel", "recurrent", "chunkwise"])
def test_gradcheck(mode):
    p = make_problem(2, 6, 1, 2, 2, 3, per_token=True, holes=True, seed=10)
    inputs = tuple(x.requires_grad_() for x in (p.q, p.k, p.v, p.log_decay, p.state))

    def run(q, k, v, log_decay, state):
        return retention(q, k, v, log_decay, state=state, mask=p.mask, mode=mode, chunk_size=4)

    assert torch.autograd.gradcheck(run, inputs)


def test_decay_gradient_of_a_fast_decay_among_slow_ones_does_not_cancel():
    """A token that forgets nearly everything, between slow ones: its gradient must stay accurate."""
    p = make_problem(1, 64, 1, 1, 8, 8, per_token=True, seed=11)
    p.log_decay[:] = -0.001
    p.log_decay[0, 30] = -25.0
    p32 = p.to(torch.float32)
    expected = p32.to(torch.float64).solve(reference.recurrent)["dlog_decay"][0, 30, 0]
    for mode in ("parallel", "chunkwise", "recurrent"):
        got = p32.solve(retention, mode=mode, chunk_size=16)["dlog_decay"][0, 30, 0]
        assert abs(got - expected) < 1e-4 * abs(expected)


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    p = make_problem(2, 9, 1, 2, 4, 3, packed=packed, holes=True, seed=12).to(torch.float32)
    inputs = [x.requires_grad_() for x in (p.q, p.k, p.v, p.log_decay, p.state)]
    for mode in ("recurrent", "chunkwise"):
        torch.library.opcheck(
            torch.ops.retnet.retention,
            (*inputs[:4], 0.5, inputs[4], p.mask, p.cu_seqlens, 4, mode, torch.float32, mode == "recurrent"),
        )
    if not packed:
        plain = [x.detach() for x in inputs]
        torch.library.opcheck(torch.ops.retnet.retention_step_, (*plain, 0.5, p.mask))


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    p = make_problem(2, 20, 2, 4, 8, 8, per_token=True, holes=True, seed=13).to(torch.float32)

    def run(q, k, v, log_decay, **options):
        return retention(q, k, v, log_decay, **options)

    compiled = p.solve(torch.compile(run, fullgraph=True, backend="aot_eager"))
    eager = p.solve(run)
    for name, x in compiled.items():
        assert relative_error(x, eager[name]) < 1e-6, name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_code_calls_the_operator(device):
    """It does not call the plain operators of torch.export: unrolled, they are slow to compile and slow to run."""
    called = []

    def backend(graph, inputs):
        called.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    x = torch.randn(1, 200, 2, 16, device=device)
    decay = torch.full((2,), -0.1, device=device)
    torch.compile(lambda x: retention(x, x, x, decay, mode="chunkwise")[0], fullgraph=True, backend=backend)(x)
    assert called.count(torch.ops.retnet.retention) + called.count(torch.ops.retnet.retention.default) == 1
    assert torch.einsum not in called


def test_autocast_narrows_only_q_k_and_v():
    p = make_problem(1, 20, 1, 2, 8, 8, seed=14).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = retention(p.q, p.k, p.v.bfloat16(), p.log_decay, state=p.state)
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    narrow, _ = retention(p.q.bfloat16(), p.k.bfloat16(), p.v.bfloat16(), p.log_decay, state=p.state)
    assert torch.equal(out, narrow)


def test_memory_beyond_results_is_a_few_chunks():
    """No temporary of the streamed forward or backward is larger than the largest result, whatever T."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(x, torch.Tensor) and x._base is None:
                    self.numel = max(self.numel, x.numel())
            return result

    T, C = 1024, 16
    p = make_problem(1, T, 1, 2, 8, 16, per_token=True, seed=15)
    problem = RetentionProblem(p.q, p.k, p.v, p.log_decay, 1.0, p.state, chunk_size=C)
    with Largest() as largest:
        cpu_chunkwise.forward(problem, None, torch.float64)
        cpu_chunkwise.backward(problem, p.dout, p.dstate, None, True)
    assert largest.numel <= T * 2 * 16


def test_two_runs_give_the_same_bits():
    p = make_problem(2, 300, 2, 4, 16, 16, per_token=True, seed=16).to(torch.float32)
    first, second = p.solve(retention), p.solve(retention)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(1, 4, 8)}, r"q has shape \[1, 4, 8\].*\[B, T, G, K\]"),
        ({"v": torch.zeros(1, 5, 2, 8)}, r"v \[1, 5, 2, 8\].*same B and T"),
        ({"v": torch.zeros(1, 4, 3, 8)}, "G dividing H"),
        ({"k": torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16)}, "one floating-point dtype"),
        ({"log_decay": torch.zeros(3)}, r"log_decay.*\[3\].*\[2\] or \[1, 4, 2\]"),
        ({"log_decay": torch.zeros(2, dtype=torch.float64)}, "float64.*float32"),
        ({"log_decay": torch.tensor([0.1, -1])}, "log_decay reaches 0.1"),
        ({"log_decay": torch.tensor([torch.nan, -1])}, "no NaN"),
        ({"state": torch.zeros(1, 2, 8, 7)}, r"state.*\[1, 2, 8, 8\]"),
        ({"mask": torch.ones(1, 4)}, r"mask is torch.float32.*bool \[1, 4\]"),
        ({"cu_seqlens": torch.tensor([0, 3])}, r"cu_seqlens is \[0, 3\].*T = 4"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, "rising"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "int32 or int64"),
        ({"mode": "serial"}, "mode is 'serial'; accepted: auto, parallel"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"state_dtype": torch.int64}, "state_dtype is torch.int64; accepted: a floating-point dtype"),
        ({"scale": "a"}, "scale is 'a'; accepted: a number"),
        ({"v": torch.zeros(1, 4, 0, 8), "log_decay": torch.zeros(0)}, "no empty head"),
        ({"backend": "triton"}, "backend is 'triton'.*cpu"),
    ],
)
def test_errors_name_what_was_given_and_what_is_accepted(changes, message):
    arguments = {
        "q": torch.zeros(1, 4, 2, 8),
        "k": torch.zeros(1, 4, 2, 8),
        "v": torch.zeros(1, 4, 2, 8),
        "log_decay": torch.zeros(2),
    } | changes
    with pytest.raises((ValueError, TypeError), match=message):
        retention(**arguments)


def test_strided_cu_seqlens_reach_the_kernels_contiguous():
    q = torch.randn(1, 9, 1, 8)
    wide = torch.tensor([[0, 7], [5, 7], [9, 7]])
    given = []
    operator = torch.ops.retnet.retention

    class Spy:
        default = operator.default

        def __call__(self, *arguments):
            given.append(arguments[7])
            return operator(*arguments)

    with mock.patch.object(torch.ops.retnet, "retention", Spy()):
        out, _ = retention(q, q, q, torch.tensor([-0.1]), cu_seqlens=wide[:, 0])
    assert given[0].is_contiguous()
    assert torch.equal(out, retention(q, q, q, torch.tensor([-0.1]), cu_seqlens=wide[:, 0].clone())[0])


def test_a_step_needs_a_state():
    q = torch.zeros(1, 1, 1, 8)
    with pytest.raises(TypeError, match="state is None; accepted: the tensor"):
        retention_step_(q, q, q, torch.zeros(1), None)


def test_a_forced_recurrent_form_of_packed_sequences_is_recurrent_on_a_gpu_too():
    """Called directly: the CUDA operator has no kernel for it and runs the CPU form."""
    from retnet.ops import library

    q, log_decay, bounds = torch.randn(1, 9, 2, 8), torch.tensor([-0.1, -0.2]), torch.tensor([0, 4, 4, 9])
    wanted = (0.3, None, None, bounds, 0, "recurrent", torch.float32, True)
    out, final = library._retention_cuda(q, q, q, log_decay, *wanted)
    expected, last = retention(q, q, q, log_decay, scale=0.3, cu_seqlens=bounds, mode="recurrent")
    assert torch.equal(out, expected)
    assert torch.equal(final, last)
