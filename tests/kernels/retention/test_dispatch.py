"""Chunkwise kernels against the float64 oracle: outputs, final states and every gradient, for every argument."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from retnet.ops import reference

pytest.importorskip("triton")

from retnet.kernels.retention import dispatch
from retnet.kernels.retention.dispatch import retention_backward, retention_forward
from retnet.kernels.retention.portable import border_states as states
from retnet.kernels.retention.portable.sequence_parts import join_parts
from retnet.kernels.retention.problem import RetentionProblem


@dataclass(frozen=True)
class Case:
    """One problem. `cu`: boundaries of packed sequences; `decay`: the kind of log_decay."""

    name: str
    B: int = 1
    T: int = 70
    G: int = 2
    H: int = 2
    K: int = 16
    V: int = 16
    decay: str = "fixed"
    masked: bool = False
    state: bool = True
    dfinal: bool = True
    cu: tuple[int, ...] | None = None
    chunk: int = 64
    dtype: torch.dtype = torch.float32


SMALL = [
    Case("one ragged segment", T=37, V=32),
    Case("two segments", T=70, state=False, dfinal=False),
    Case("one token", B=2, T=1),
    Case("no token", B=2, T=0),
    Case("heads share groups", G=1, H=3),
    Case("mask with holes", B=2, masked=True),
    Case("decay per token", B=2, decay="token"),
    Case("decay per token with mask and groups", G=1, decay="token", masked=True),
    Case("hard resets", T=131, G=1, decay="resets"),
    Case("a head that forgets everything", decay="forgets"),
    Case("packed, with empty and one-token sequences", T=200, G=1, cu=(0, 1, 1, 66, 67, 131, 200)),
    Case("packed, decay per token, masked", T=133, G=1, decay="resets", masked=True, cu=(0, 65, 65, 133)),
    Case("head sizes that fill no tile", T=40, G=1, H=1, K=48, V=80),
    Case("two groups of two heads, masked", G=2, H=4, V=32, decay="token", masked=True),
    Case("heads that share with a fixed decay", G=1, K=32, dtype=torch.float16),
    Case("segment of 128", T=150, G=1, H=1, decay="token", chunk=128),
    Case("float16", dtype=torch.float16),
]


def make_inputs(case: Case, device: str) -> dict[str, Tensor | None]:
    """Inputs rounded to the case's dtype, in float64."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).double().to(device)

    B, T, H, K, V = case.B, case.T, case.H, case.K, case.V
    log_decay = torch.log1p(-torch.exp2(-5.0 - torch.arange(H)))
    if case.decay == "forgets":
        log_decay[0] = -torch.inf
    elif case.decay != "fixed":
        log_decay = -0.3 * torch.rand(B, T, H, generator=generator)
    if case.decay == "resets":
        kinds = torch.tensor([-1000.0, -20.0, -0.01, -torch.inf, -100.0, -0.5, -0.01, 0.0])
        log_decay = kinds[torch.randint(0, 8, (B, T, H), generator=generator)]
    N = B if case.cu is None else len(case.cu) - 1
    return {
        "q": normal(B, T, case.G, K),
        "k": normal(B, T, case.G, K),
        "v": normal(B, T, H, V),
        "log_decay": log_decay.double().to(device),
        "state": normal(N, H, K, V, dtype=torch.float32) if case.state else None,
        "dout": normal(B, T, H, V),
        "dfinal": normal(N, H, K, V, dtype=torch.float32) if case.dfinal else None,
        "mask": (torch.rand(B, T, generator=generator) < 0.7).to(device) if case.masked else None,
        "cu_seqlens": None if case.cu is None else torch.tensor(case.cu, device=device),
    }


def by_reference(form, inputs: dict[str, Tensor | None], dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """Outputs and gradients of a form of the oracle, computed in `dtype` by autograd.

    log_decay is expanded per token, to get the terms that its gradient sums."""
    B, T, H = inputs["v"].shape[:3]
    leaves = {
        name: x.to(dtype if name in ("q", "k", "v") else x.dtype).detach().requires_grad_()
        for name, x in inputs.items()
        if name in ("q", "k", "v", "state") and x is not None
    }
    leaves["log_decay"] = inputs["log_decay"].expand(B, T, H).clone().requires_grad_()
    arguments = {"state": None, **leaves}
    out, final = form(**arguments, scale=0.3, mask=inputs["mask"], cu_seqlens=inputs["cu_seqlens"], **options)
    loss = (out.double() * inputs["dout"]).sum()
    if inputs["dfinal"] is not None:
        loss = loss + (final.double() * inputs["dfinal"]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    result = {"out": out.detach(), "final": final.detach()}
    for name, leaf, grad in zip(leaves, leaves.values(), grads):
        result[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return result


def make_problem(case: Case, inputs: dict[str, Tensor | None]) -> tuple[RetentionProblem, Tensor, Tensor | None]:
    """The problem in the case's dtype, and the gradients of its output and final state."""
    q, k, v, dout = (inputs[name].to(case.dtype) for name in ("q", "k", "v", "dout"))
    state, dfinal = (None if inputs[name] is None else inputs[name].float() for name in ("state", "dfinal"))
    rest = (inputs["log_decay"].float(), 0.3, state, inputs["mask"], inputs["cu_seqlens"], case.chunk)
    return RetentionProblem(q, k, v, *rest), dout, dfinal


def run(
    problem: RetentionProblem, dout: Tensor, dfinal: Tensor | None, *, need_dlog_decay: bool = True
) -> dict[str, Tensor]:
    """The output, the final state and all gradients that are not None, by name."""
    out, final = retention_forward(problem, torch.float32)
    need_dstate = problem.state is not None
    grads = retention_backward(problem, dout, dfinal, need_dlog_decay=need_dlog_decay, need_dstate=need_dstate)
    assert (grads.dlog_decay is not None, grads.dstate is not None) == (need_dlog_decay, need_dstate)
    results = {"out": out, "final": final, **{name: getattr(grads, name) for name in grads.__slots__}}
    return {name: x for name, x in results.items() if x is not None}


def by_kernels(case: Case, inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return run(*make_problem(case, inputs))


def errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """norm(x - ref) / norm(ref); for the gradient of a fixed decay, relative to the terms per token that it sums."""
    result = {}
    for name, x in got.items():
        ref = expected[name].double()
        size = ref.norm()
        if name == "dlog_decay" and x.dim() == 1:
            size = ref.abs().sum((0, 1)).norm()
            ref = ref.sum((0, 1))
        assert x.shape == ref.shape, name
        assert not x.isnan().any(), name
        result[name] = ((x.double() - ref).norm() / size.clamp(min=1e-30)).item() if ref.numel() else 0.0
    return result


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_kernels_agree_with_the_oracle(case, device):
    inputs = make_inputs(case, device)
    found = errors(by_kernels(case, inputs), by_reference(reference.recurrent, inputs, torch.float64))
    bound = {torch.float32: 2e-6, torch.float16: 2e-3}[case.dtype]
    bad = {name: error for name, error in found.items() if error > (10 * bound if name == "dlog_decay" else bound)}
    assert not bad, bad


def is_slow(case: Case):
    return () if case.name == "one ragged segment" else pytest.mark.slow


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=is_slow(case)) for case in SMALL])
def test_calls_of_one_kind_are_replayed_on_their_own_tensors(case, device):
    recordings = dispatch.forward_passes, dispatch.backward_passes
    for passes in recordings:
        passes.forget()
    inputs = make_inputs(case, device)
    halved = inputs | {name: None if inputs[name] is None else inputs[name] / 2 for name in ("k", "state", "dfinal")}
    problems = [make_problem(case, given) for given in (inputs, halved)]
    wanted = [run(*problem) for problem in problems]  # the first runs, the second is recorded
    found = [run(*problem) for problem in problems]
    assert all(any(passes._found.values()) for passes in recordings)
    for a, b in zip(wanted, found):
        assert all(torch.equal(a[name], b[name]) for name in a)


PARTED = [
    Case("fixed", T=330),
    pytest.param(Case("fixed, masked, float16", T=330, H=4, masked=True, dtype=torch.float16), marks=pytest.mark.slow),
    Case("per token, no states", T=300, G=1, decay="token", state=False, dfinal=False),
    pytest.param(Case("resets", B=2, T=290, G=1, decay="resets"), marks=pytest.mark.slow),
    Case("packed, with one that has fewer segments than parts", T=520, G=1, cu=(0, 1, 1, 300, 520), decay="token"),
]


@pytest.mark.parametrize("case", PARTED, ids=lambda case: case.name)
def test_parts_of_a_sequence_are_joined(case, device, monkeypatch):
    """Parts of a sequence, as on a GPU with more processors than programs."""
    monkeypatch.setattr(states, "LEAST_SEGMENTS", 1)
    monkeypatch.setattr(states, "MOST_PARTS", 3 if case.cu is None else 2)
    monkeypatch.setattr(states, "multiprocessors", lambda device: 1000)
    dispatch.forward_passes.forget()
    dispatch.backward_passes.forget()
    joined = []
    monkeypatch.setattr(states, "join_parts", lambda *args, **kwargs: joined.append(join_parts(*args, **kwargs)))
    test_kernels_agree_with_the_oracle(case, device)
    assert len(joined) == 3


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["fixed", "token"])
def test_slow_decays_keep_float32_accuracy_over_many_segments(decay, device):
    case = Case("", T=4096, G=1, H=1, state=True)
    inputs = make_inputs(case, device)
    slow = torch.log1p(-torch.exp2(torch.tensor([-12.3], dtype=torch.float64, device=device))).float().double()
    inputs["log_decay"] = slow if decay == "fixed" else slow.expand(1, 4096, 1).contiguous()
    found = errors(by_kernels(case, inputs), by_reference(reference.chunkwise, inputs, torch.float64, chunk_size=256))
    bad = {name: error for name, error in found.items() if error > (2e-5 if name == "dlog_decay" else 2e-6)}
    assert not bad, bad


@pytest.mark.parametrize("cu", [None, (0, 65, 65, 133)], ids=["rows", "packed"])
def test_unwanted_states_are_not_computed_and_change_no_other_result(cu, device):
    inputs = make_inputs(Case("", T=133, state=False, dfinal=False, cu=cu), device)
    problem, dout, _ = make_problem(Case(""), inputs)
    out, final = retention_forward(problem, None)
    assert final is None
    assert torch.equal(out, retention_forward(problem, torch.float32)[0])
    lean = retention_backward(problem, dout, None, need_dlog_decay=False, need_dstate=False)
    full = retention_backward(problem, dout, None, need_dlog_decay=True, need_dstate=True)
    assert lean.dlog_decay is None
    assert lean.dstate is None
    assert all(torch.equal(getattr(lean, name), getattr(full, name)) for name in ("dq", "dk", "dv"))


def test_a_chunk_size_is_rounded_to_the_nearest_segment_length():
    from retnet.kernels.retention.tiles import nearest_segment

    assert [nearest_segment(n) for n in (1, 64, 96, 97, 128, 200, 10**6)] == [64, 64, 64, 128, 128, 256, 256]


# (K, V, H): two heads, and enough heads to fill a GPU with the largest tiles
HEAD_SIZES = [(32, 32, 2), (64, 128, 2), (128, 128, 2), (256, 512, 2), (512, 512, 2), (144, 80, 2), (512, 64, 2)]
HEAD_SIZES += [(64, 64, 80), (128, 128, 40), (256, 512, 20)]


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", HEAD_SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("decay", ["fixed", "token"])
def test_every_dtype_and_head_size_is_as_accurate_as_the_parallel_form(sizes, dtype, decay, device):
    K, V, H = sizes
    case = Case("", B=2, T=389, G=1 if H == 2 else H, H=H, K=K, V=V, decay=decay, dtype=dtype, chunk=0)
    inputs = make_inputs(case, device)
    expected = by_reference(reference.parallel, inputs, torch.float64)
    found = errors(by_kernels(case, inputs), expected)
    if dtype == torch.float32:
        allowed = {name: 2e-5 if name == "dlog_decay" else 2e-6 for name in found}
    else:
        plain = by_reference(reference.parallel, inputs, dtype)
        size = {name: expected[name].double().norm() for name in found}
        allowed = {
            name: 2 * ((plain[name].double() - expected[name].double()).norm() / size[name]).item() for name in found
        }
    bad = {name: (error, allowed[name]) for name, error in found.items() if error > allowed[name]}
    assert not bad, bad


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(64, 128), (128, 128), (256, 512)], ids=str)
@pytest.mark.parametrize("T", [1, 63, 389])
def test_the_choice_of_kernels_does_not_change_the_result(sizes, T, device):
    """With a fixed decay and no gradient of it, a Hopper GPU uses walks."""
    case = Case("", B=2, T=T, K=sizes[0], V=sizes[1], dtype=torch.bfloat16, chunk=0)
    inputs = make_inputs(case, device)
    expected = by_reference(reference.parallel, inputs, torch.float64)
    plain = by_reference(reference.parallel, inputs, case.dtype)
    for name, x in run(*make_problem(case, inputs), need_dlog_decay=False).items():
        allowed = 2 * (plain[name].double() - expected[name].double()).norm()
        assert (x.double() - expected[name].double()).norm() <= allowed, name


@pytest.mark.gpu
@pytest.mark.parametrize("decay", ["fixed", "token", "resets"])
@pytest.mark.parametrize("T", [8191, 131072])
def test_long_sequences_keep_float32_accuracy(decay, T, device):
    case = Case("", T=T, G=1, H=2, K=64, V=64, decay=decay, chunk=0)
    inputs = make_inputs(case, device)
    found = errors(by_kernels(case, inputs), by_reference(reference.chunkwise, inputs, torch.float64, chunk_size=256))
    bad = {name: error for name, error in found.items() if error > (2e-5 if name == "dlog_decay" else 2e-6)}
    assert not bad, bad


@pytest.mark.gpu
@pytest.mark.parametrize("decay", ["fixed", "token"])
def test_two_runs_give_the_same_bits(decay, device):
    case = Case("", B=3, T=1000, G=2, H=4, K=128, V=128, decay=decay, dtype=torch.bfloat16, chunk=0)
    inputs = make_inputs(case, device)
    first, second = by_kernels(case, inputs), by_kernels(case, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
def test_packed_documents_do_not_leak(device):
    case = Case("", T=700, G=2, H=2, K=64, V=64, cu=(0, 130, 131, 500, 700), decay="token", chunk=0)
    inputs = make_inputs(case, device)
    before = by_kernels(case, inputs)
    changed = {**inputs, **{name: inputs[name].clone() for name in ("q", "k", "v", "dout")}}
    for name in ("q", "k", "v", "dout"):
        changed[name][:, 499] += 1.0
    after = by_kernels(case, changed)
    outside = torch.ones(700, dtype=torch.bool, device=device)
    outside[131:500] = False
    for name in ("out", "dq", "dk", "dv", "dlog_decay"):
        assert torch.equal(before[name][:, outside], after[name][:, outside]), name
        assert not torch.equal(before[name], after[name]), name


@pytest.mark.gpu
def test_masked_tokens_are_never_read(device):
    case = Case("", B=2, T=300, K=64, V=64, masked=True, dtype=torch.bfloat16, chunk=0)
    inputs = make_inputs(case, device)
    clean = by_kernels(case, inputs)
    poisoned = dict(inputs)
    for name in ("q", "k", "v", "dout"):
        poisoned[name] = inputs[name].masked_fill(~inputs["mask"][..., None, None], torch.nan)
    found = by_kernels(case, poisoned)
    assert all(torch.equal(clean[name], found[name]) for name in clean)


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_past_two_to_the_31_elements(device):
    """v has more than 2^31 elements; its tail is compared with the oracle, started from the kernels' own state."""
    T, H, K, V, tail = (1 << 19) + 77, 32, 32, 128, 1000
    generator = torch.Generator(device=device).manual_seed(0)
    q, k, v = (
        torch.randn(1, T, heads, width, generator=generator, device=device, dtype=torch.bfloat16)
        for heads, width in ((1, K), (1, K), (H, V))
    )
    assert v.numel() > 2**31
    log_decay = torch.log1p(-torch.exp2(-5.0 - 0.1 * torch.arange(H, device=device)))
    problem = RetentionProblem(q, k, v, log_decay, 0.3)
    out, final = retention_forward(problem, torch.float32)
    _, middle = retention_forward(
        RetentionProblem(q[:, :-tail], k[:, :-tail], v[:, :-tail], log_decay, 0.3), torch.float32
    )
    parts = [x[:, -tail:].double() for x in (q, k, v)]
    parts = [x.requires_grad_() for x in parts]
    expected, last = reference.parallel(*parts, log_decay.double(), scale=0.3, state=middle.double())
    assert (out[:, -tail:].double() - expected).norm() / expected.norm() < 5e-3
    assert (final - last).norm() / last.norm() < 5e-3
    grads = torch.autograd.grad((expected * v[:, -tail:].double()).sum(), parts)
    found = retention_backward(problem, v, None, need_dlog_decay=False, need_dstate=False)
    for x, ref in zip((found.dq, found.dk, found.dv), grads):
        assert (x[:, -tail:].double() - ref).norm() / ref.norm() < 2e-2


@pytest.mark.gpu
def test_views_of_a_fused_projection_give_the_same_bits(device):
    case = Case("", B=2, T=200, K=64, V=64, dtype=torch.bfloat16, chunk=0)
    inputs = make_inputs(case, device)
    fused = torch.cat([inputs[name] for name in ("q", "k", "v")], 2)
    views = dict(zip(("q", "k", "v"), fused.split(2, 2)))
    assert not views["k"].is_contiguous()
    plain, strided = by_kernels(case, inputs), by_kernels(replace(case), {**inputs, **views})
    assert all(torch.equal(plain[name], strided[name]) for name in plain)


def test_nan_in_a_float16_state_stays_nan(device):
    """A GPU's NaN has all bits set: rounded like a number, it would become zero."""
    q = torch.randn(1, 200, 1, 16, device=device).half()
    nan = torch.full((1, 1, 16, 16), 0x7FFFFFFF, dtype=torch.int32, device=device).view(torch.float32)
    out, final = retention_forward(
        RetentionProblem(q, q, q, torch.tensor([-0.01], device=device), 1.0, nan), torch.float32
    )
    assert out.isnan().all()
    assert final.isnan().all()
