"""The model of every CORE specification: built, counted, trained for a step, decoded with a cache."""

import pytest
import torch
import torch.nn.functional as F

from retnet.models.cost import parameter_counts
from retnet.models.decode.generation import generate
from retnet.stack import load_stack
from retnet.stack.build import model_config

from .shrink import shrunk, shrunk_model
from .test_stack_corpus import CORPUS, EXOTIC_FEATURES, cases

CORE = cases("valid", "CORE")
SUPPORTED = [*CORE, *(case for case in cases("valid", "EXOTIC") if not EXOTIC_FEATURES.get(case.values[0]))]
VOCAB, T = 97, 29


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(VOCAB, (2, T), generator=torch.Generator().manual_seed(0))


def estimate_correction(stack) -> int | None:
    """The error of EulerStack's estimate, where it can be calculated; None elsewhere.

    The estimate counts d weights for the decay of retention, no gate, and values of width d. It counts no biases, a
    gate for every expert, and takes tying from the head's key only.
    """
    spec, d, correction = stack.spec, stack.spec.model.d_model, 0
    hidden = d * spec.model.mlp_ratio
    if "tie_weights" not in spec.head.model_fields_set and not spec.embedding.tie_word_embeddings:
        correction += spec.model.vocab_size * d
    for layer in stack.layers:
        if layer.mixer_type not in ("attention", "retnet") or layer.ffn.type == "moe":
            return None
        if layer.mixer_type == "retnet":
            correction += 4 * d * d - d
        elif layer.mixer.qkv_bias:
            correction += d + 2 * spec.model.kv_heads * spec.model.head_dim
        if layer.ffn.bias:
            correction += (2 if layer.ffn.type == "gated_mlp" else 1) * hidden + d
        correction += 2 * d * (layer.norm.type == "layernorm")  # biases of the norms
    last = stack.layers[-1].norm
    correction += {"pre": 0, "post": -d}[last.position] + d * (last.type == "layernorm" and last.position == "pre")
    return correction


@pytest.mark.parametrize(("name", "entry"), CORE)
def test_the_parameters_of_the_full_model_are_counted(name, entry):
    stack = load_stack(CORPUS / "valid" / name)
    count = parameter_counts(model_config(stack))["total"]
    correction = estimate_correction(stack)
    if correction is not None:
        assert count == entry["est_params"] + correction
    assert 0.7 < count / entry["est_params"] < 1.9


@pytest.mark.parametrize(("name", "entry"), CORE)
def test_every_parameter_learns(name, entry, ids):
    model = shrunk_model(load_stack(CORPUS / "valid" / name)).train()
    loss = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    assert torch.isfinite(loss)
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name
        if not (parameter_name.endswith("router.weight") and len(parameter) == 1):  # one expert: no gradient
            assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize(("name", "entry"), SUPPORTED)
@torch.no_grad()
def test_cached_logits_and_generation_equal_the_full_forward(name, entry, ids):
    stack = load_stack(CORPUS / "valid" / name)
    model = shrunk_model(stack)
    full = model(ids).logits
    if not all(layer.keeps_state for layer in shrunk(stack).layers):
        with pytest.raises(ValueError, match="layer 0"):
            model(ids, carry=True)
        return
    output = model(ids[:, :10], carry=True)
    pieces, state = [output.logits], output.state
    for t in range(10, T):
        output = model(ids[:, t : t + 1], state, carry=True, in_place=True)
        pieces.append(output.logits)
        state = output.state
    cached = torch.cat(pieces, 1)
    assert (cached - full).norm() <= 1e-5 * (full - full.mean(-1, keepdim=True)).norm()
    assert (model(ids[:, :10]).logits - full[:, :10]).norm() <= 1e-5 * full[:, :10].norm(), (
        "a prefix depends on what follows"
    )

    with_cache = torch.stack(list(generate(model, ids[:, :7], 12, temperature=0)), 1)
    without = ids[:, :7]
    for _ in range(12):
        without = torch.cat([without, model(without).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(with_cache, without[:, 7:])
