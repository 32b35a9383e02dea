"""Second derivatives of whole models, and per-sample gradients: every mixer, on the routes that optimizers take."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from retnet.models.decode.decoder import can_fuse
from tests.small_models import (
    ALIBI,
    BIRKHOFF,
    EXPERTS,
    GATED,
    HYENA,
    MAMBA1,
    MAMBA2,
    PAPER,
    WINDOW,
    random_ids,
    small_model,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.func imports torch.jit

LAYERS = {
    "retention": PAPER,
    "gated retention": GATED,
    "learnable decay": replace(
        PAPER, mixer=replace(PAPER.mixer, learnable_decay=True, decay_norm=True, num_kv_heads=1)
    ),
    "attention": replace(WINDOW, mixer=replace(WINDOW.mixer, window=None)),
    "windows": WINDOW,
    "alibi": ALIBI,
    "mamba2": MAMBA2,
    "mamba1": MAMBA1,
    "hyena": HYENA,
    "experts": replace(PAPER, feed_forward=EXPERTS),
    "residual streams": replace(GATED, hyper=BIRKHOFF),
}
IDS, LABELS = random_ids(2, 7), random_ids(2, 7, seed=1)


class Loss(torch.nn.Module):
    """The loss of a model as a module, for functional_call."""

    def __init__(self, layer, kind):
        super().__init__()
        self.model, self.kind = small_model([layer], dtype="float64"), kind

    def forward(self, ids=IDS):
        if self.kind == "fused":
            return self.model.loss(ids, LABELS)
        if self.kind == "packed":
            return self.model.loss(ids.view(1, -1), LABELS.view(1, -1), cu_seqlens=torch.tensor([0, 5, 5, 8, 14]))
        mask = torch.ones_like(IDS, dtype=torch.bool)
        mask[0, :2] = False
        logits = self.model(ids, mask=mask).logits
        return F.cross_entropy(logits.flatten(0, 1), LABELS.flatten())


def flat(tensors) -> torch.Tensor:
    return torch.cat([x.flatten() for x in tensors])


def twice(loss, weights, direction):
    variables = {name: x.clone().requires_grad_() for name, x in weights.items()}
    with sdpa_kernel(SDPBackend.MATH):
        value = functional_call(loss, variables)
    options = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(value, list(variables.values()), create_graph=True, **options)
    return torch.autograd.grad(flat(first), list(variables.values()), flat(direction.values()), **options)


def forward_over_reverse(loss, weights, direction):
    return jvp(grad(lambda w: functional_call(loss, w)), (weights,), (direction,))[1].values()


def reverse_over_forward(loss, weights, direction):
    return grad(lambda w: jvp(lambda w: functional_call(loss, w), (w,), (direction,))[1])(weights).values()


@pytest.mark.parametrize(
    ("kind", "route"),
    [
        ("fused", twice),
        ("packed", twice),
        ("masked", twice),
        ("fused", forward_over_reverse),
        ("packed", reverse_over_forward),
    ],
)
@pytest.mark.parametrize("layer", LAYERS)
def test_hessian_vector_products_equal_differences_of_gradients(layer, kind, route):
    loss = Loss(LAYERS[layer], kind)
    weights = {name: x.detach() for name, x in loss.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    direction = {n: torch.randn(x.shape, dtype=x.dtype, generator=generator) for n, x in weights.items()}

    def gradient(step):
        moved = {name: (x + step * direction[name]).requires_grad_() for name, x in weights.items()}
        found = torch.autograd.grad(functional_call(loss, moved), list(moved.values()), allow_unused=True)
        return flat(torch.zeros_like(x) if g is None else g for g, x in zip(found, weights.values()))

    expected = (gradient(1e-5) - gradient(-1e-5)) / 2e-5
    product = flat(route(loss, weights, direction))
    assert (product - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_per_sample_by_vmap_are_those_of_each_sample(layer):
    loss = Loss(LAYERS[layer], "fused")
    weights = {name: x.detach() for name, x in loss.named_parameters()}
    samples = torch.stack([IDS, IDS.flip(0), LABELS])
    one = grad(lambda w, ids: functional_call(loss, w, (ids,)))
    together = vmap(one, in_dims=(None, 0))(weights, samples)
    for n, ids in enumerate(samples):
        expected = one(weights, ids)
        torch.testing.assert_close({name: x[n] for name, x in together.items()}, expected, rtol=1e-9, atol=1e-12)
    deepcopy(loss)  # nothing of the transform is left in the modules


@torch.no_grad()
def test_a_tangent_of_a_weight_is_not_lost_to_what_inference_keeps():
    """Hyena keeps its filters in inference, and decoding packs weights."""
    loss = Loss(HYENA, "masked")
    loss()  # keeps the filters
    name = "model.layers.0.mixer.filters.filter_out.weight"
    weight = loss.get_parameter(name)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(weight.detach(), torch.ones_like(weight))}
        tangent = forward_ad.unpack_dual(functional_call(loss, dual)).tangent
        assert not can_fuse(loss.model)
    assert can_fuse(loss.model)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss(), weight)
    torch.testing.assert_close(tangent, gradient.sum(), rtol=1e-9, atol=1e-12)
