"""Derivatives beyond the first one in reverse mode: of every operator with a backward of its own, on every route."""

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from retnet import retention, retention_step_
from retnet.models.loss import linear_cross_entropy
from retnet.ops import reference
from retnet.ops.norms import normalize
from retnet.ops.selective_scan import selective_scan
from retnet.ops.short_convolution import short_convolution

from .conftest import make_problem

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.func imports torch.jit


def _double(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _score(*results):
    """A scalar with second derivatives in every result."""
    return sum((x.double() ** 3).sum() for x in results)


def _of_retention(form, problem, options, inputs):
    """q, k, v, log_decay and state are functions of each other, as the projections of a layer are."""
    x = inputs.reshape(problem.q.shape)
    k = problem.k + x.tanh()
    v = problem.v + k.sum(-1).repeat_interleave(problem.v.shape[2] // k.shape[2], 2)[..., None]
    log_decay = problem.log_decay - x.mean().square()
    state = problem.state * (1 + x.sum().sin())
    call = {"mask": problem.mask, "cu_seqlens": problem.cu_seqlens, **options}
    return _score(*form(x, k, v, log_decay, state=state, **call))


def _retention(options=None, **sizes):
    problem = make_problem(**{"B": 2, "T": 5, "G": 1, "H": 2, "K": 2, "V": 3, **sizes})
    return (
        partial(_of_retention, retention, problem, {"chunk_size": 2, **(options or {})}),
        partial(_of_retention, reference.recurrent, problem, {}),
        problem.q.flatten(),
    )


def _scan(packed: bool):
    bounds = [0, 3, 3, 7] if packed else [0, 7]
    x, (write, read), rate = _double(1, 7, 2), _double(2, 1, 7, 3, seed=1), -_double(2, 3, seed=2).exp()
    state = _double(len(bounds) - 1, 2, 3, seed=3)

    def inputs(x):
        x = x.view(1, 7, 2)
        return x, F.softplus(x), rate * (1 + x.mean() ** 2), write + x.sum(-1, keepdim=True), read * x[..., :1]

    def own(x):
        cu_seqlens = torch.tensor(bounds) if packed else None
        return _score(*selective_scan(*inputs(x), state=state, cu_seqlens=cu_seqlens, chunk_size=2))

    def definition(x):
        x, step, rate, write, read = inputs(x)
        total = 0
        for n, (begin, end) in enumerate(pairwise(bounds)):
            h = state[n]
            for t in range(begin, end):
                h = (step[0, t, :, None] * rate).exp() * h + torch.outer(step[0, t] * x[0, t], write[0, t])
                total = total + _score(h @ read[0, t])
            total = total + _score(h)
        return total

    return own, definition, x.flatten()


def _loss(soft_cap):
    labels, weight = torch.tensor([1, -100, 3, 0]), _double(5, 3, seed=1)

    def own(x):
        return linear_cross_entropy(x.view(4, 3), weight + x.sum(), labels, soft_cap)

    def definition(x):
        logits = x.view(4, 3) @ (weight + x.sum()).T
        logits = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
        return F.cross_entropy(logits, labels)

    return own, definition, _double(12)


def _convolution(activation):
    weight = _double(2, 1, 3, seed=1)

    def own(x):
        recent = x[:4].view(1, 2, 2)
        return _score(
            *short_convolution(x.view(1, 5, 2), weight * x.sum(), x[:2], activation=activation, recent=recent)
        )

    def definition(x):
        whole = torch.cat([x[:4].view(1, 2, 2), x.view(1, 5, 2)], 1).transpose(1, 2)
        pre = F.conv1d(whole, weight * x.sum(), x[:2], groups=2)
        return _score(F.silu(pre) if activation == "silu" else pre, whole[:, :, -2:])

    return own, definition, _double(10)


def _norm():
    def own(x):
        return _score(normalize(x.view(3, 4), "layer", 1e-3))

    def definition(x):
        x = x.view(3, 4) - x.view(3, 4).mean(-1, keepdim=True)
        return _score(x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt())

    return own, definition, _double(12)


OPERATORS = {
    "parallel retention": lambda: _retention({"mode": "parallel"}),
    "recurrent retention": lambda: _retention({"mode": "recurrent"}),
    "chunkwise retention": lambda: _retention({"mode": "chunkwise"}),
    "retention of one token": lambda: _retention(T=1),
    "masked retention": lambda: _retention(holes=True, seed=4),
    "packed retention with a decay per token": lambda: _retention(packed=True, T=7, per_token=True, resets=True),
    "retention in plain operators": lambda: _retention({"backend": "aten", "mode": "chunkwise"}),
    "scan": lambda: _scan(packed=False),
    "packed scan": lambda: _scan(packed=True),
    "loss": lambda: _loss(None),
    "soft-capped loss": lambda: _loss(2.0),
    "short convolution": lambda: _convolution("none"),
    "short convolution with silu": lambda: _convolution("silu"),
    "layer norm": _norm,
}


def _twice(f, x):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.stack([torch.autograd.grad(y, x, retain_graph=True)[0] for y in first])


def _forward_over_reverse_of_the_cotangent(f, x):
    """The tangent enters behind the operator: its backward alone sees it."""
    x = x.clone().requires_grad_()
    y = f(x)
    with forward_ad.dual_level():
        scale = forward_ad.make_dual(torch.ones_like(y), torch.full_like(y, 2.0))
        (first,) = torch.autograd.grad(y, x, scale)
        return forward_ad.unpack_dual(first).tangent / 2


# route -> (order of the derivative, the derivative by that route)
ROUTES = {
    "autograd.grad twice": (2, _twice),
    "functional.hessian": (2, torch.autograd.functional.hessian),
    "functional.hessian, vectorized": (2, partial(torch.autograd.functional.hessian, vectorize=True)),
    "func.hessian": (2, lambda f, x: hessian(f)(x)),
    "jacrev of jacrev": (2, lambda f, x: jacrev(jacrev(f))(x)),
    "jacrev of jacfwd": (2, lambda f, x: jacrev(jacfwd(f))(x)),
    "vmap of grad": (1, lambda f, x: vmap(grad(f))(torch.stack([x + 1, x]))[1]),
    "grad of vmap": (1, lambda f, x: grad(lambda xs: vmap(f)(xs).sum())(torch.stack([x + 1, x]))[1]),
    "jvp": (1, lambda f, x: torch.stack([jvp(f, (x,), (e,))[1] for e in torch.eye(len(x), dtype=x.dtype)])),
    "jvp without gradients": (1, lambda f, x: torch.no_grad()(jacfwd(f))(x)),
    "functional.jacobian, vectorized": (1, partial(torch.autograd.functional.jacobian, vectorize=True)),
    "a tangent of the cotangent": (1, _forward_over_reverse_of_the_cotangent),
    "vmap": (0, lambda f, x: vmap(f)(torch.stack([x + 1, x]))[1]),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_derivative_of_every_operator_is_that_of_its_definition(operator, route):
    own, definition, x = OPERATORS[operator]()
    order, derivative = ROUTES[route]
    expected = [definition, torch.autograd.functional.jacobian, torch.autograd.functional.hessian]
    expected = expected[order](x) if order == 0 else expected[order](definition, x)
    torch.testing.assert_close(derivative(own, x), expected, rtol=1e-9, atol=1e-9)


def test_gradients_that_can_be_differentiated_again_are_the_same_gradients():
    own, _, x = OPERATORS["chunkwise retention"]()
    x.requires_grad_()
    plain, with_graph = (torch.autograd.grad(own(x), x, create_graph=graph)[0] for graph in (False, True))
    assert not plain.requires_grad
    torch.testing.assert_close(with_graph, plain, rtol=1e-12, atol=1e-12)


def test_nan_under_the_mask_reaches_no_second_derivative():
    p = make_problem(2, 5, 1, 2, 2, 3, per_token=True, holes=True, seed=4)
    results = []
    for filler in (0.0, torch.nan):
        inputs = [x.masked_fill(~p.mask[..., None, None], filler).requires_grad_() for x in (p.q, p.k, p.v)]
        first = torch.autograd.grad(_score(*retention(*inputs, p.log_decay, mask=p.mask)), inputs, create_graph=True)
        results += [torch.autograd.grad(_score(*(x[p.mask] for x in first)), inputs)]
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean[p.mask], dirty[p.mask])
        assert not dirty.isnan().any()


@pytest.mark.parametrize(
    "derive",
    [
        lambda f, q: jvp(f, (q,), (q,)),
        lambda f, q: grad(f)(q),
        lambda f, q: vmap(f)(torch.stack([q, q])),
        lambda f, q: f(q.requires_grad_()).backward(),
    ],
    ids=["jvp", "grad", "vmap", "backward"],
)
def test_a_step_in_place_refuses_derivatives_and_says_what_has_them(derive):
    q, state, log_decay = torch.randn(1, 1, 2, 3), torch.zeros(1, 2, 3, 3), -torch.rand(2)
    with pytest.raises(NotImplementedError, match=r"no derivatives.*accepted: retention"):
        derive(lambda q: retention_step_(q, q, q, log_decay, state.clone()).sum(), q)


def test_the_gradients_of_the_gpu_operators_can_be_differentiated_again():
    """The autograd formulas of `retnet::selective_scan` and `retnet::short_convolution`, with kernels for a CPU."""
    from retnet.ops import selective_scan as scan
    from retnet.ops import short_convolution as convolution

    @scan._scan_cuda.register_kernel("cpu")
    def _(*arguments):
        with torch.no_grad():
            y, final = scan._per_sequence(scan._plain_scan, *arguments)
        return y.clone(), final.clone(), final.new_zeros(1)

    @convolution._convolution_cuda.register_kernel("cpu")
    def _(*arguments):
        with torch.no_grad():
            return tuple(z.clone() for z in convolution._plain_convolution(*arguments))

    x = _double(1, 7, 3)
    of_scan = x, x.exp(), -_double(3, 2).exp(), *_double(2, 1, 7, 2), _double(2, 3, 2)
    of_convolution = x, _double(3, 1, 4), _double(3), _double(2, 3, 3)
    bounds = torch.tensor([0, 4, 7])
    convolve = torch.ops.retnet.short_convolution, short_convolution, of_convolution, "recent"
    for operator, plain, inputs, before, activation in (
        (torch.ops.retnet.selective_scan, selective_scan, of_scan, "state", {}),
        (*convolve, {"activation": "none"}),
        (*convolve, {"activation": "silu"}),
    ):
        inputs = [z.clone().requires_grad_() for z in inputs]
        options = {before: inputs[-1], "cu_seqlens": bounds, **activation}
        results = operator(*inputs, bounds, *activation.values())[:2], plain(*inputs[:-1], **options)
        hessian_vector_products = []
        for result in results:
            first = torch.autograd.grad(_score(*result), inputs, create_graph=True)
            hessian_vector_products.append(torch.autograd.grad(_score(*first), inputs, create_graph=True))
        for own, right in zip(*hessian_vector_products, strict=True):
            torch.testing.assert_close(own, right, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("mode", ["chunkwise", "recurrent"])
def test_second_derivatives_through_the_gpu_kernels_are_those_of_the_definition(mode, per_token, dtype):
    p = make_problem(2, 130, 2, 4, 64, 64, per_token=per_token, fastest=0.1, seed=5).to(dtype)

    def product(form, dtype, device, **options):
        tensors = (p.q, p.k, p.v, p.log_decay)
        wide = torch.promote_types(dtype, torch.float32)
        inputs = [x.to(device, wide if x is p.log_decay else dtype).requires_grad_() for x in tensors]
        out, _ = form(*inputs, **options)
        first = torch.autograd.grad((out * p.dout.to(out)).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum((x * x.detach()).sum() for x in first), inputs)

    expected = product(reference.recurrent, torch.float64, "cpu")
    for x, right in zip(product(retention, dtype, "cuda", mode=mode), expected, strict=True):
        error = (x.double().cpu() - right).norm() / right.norm()
        assert error < (1e-5 if dtype == torch.float32 else 3e-2)
