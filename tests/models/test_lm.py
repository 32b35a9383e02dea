"""The language model: its outputs depend only on earlier tokens, and not on the order of evaluation."""

import math
from itertools import pairwise

import pytest
import torch

from retnet import LanguageModel
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.retention import RetentionConfig
from retnet.models.presets import retnet_config
from tests.small_models import VOCAB, random_ids, small_model

VARIANTS = {
    "paper": {},
    "gated": {"decay": "gated"},
    "learnable": {"decay": "experiment", "learnable_decay": True},
    "one decay for all heads": {"decay": 0.97},
    "no decay": {"decay": "none"},
    "a list of decays": {"decay": (0.5, 1.0)},
    "a head that forgets at once": {"decay": (0.0, 0.9)},
    "decay norm": {"decay_norm": True},
    "decay norm without decay": {"decay_norm": True, "decay": "none"},
    "no swish gate": {"gate": "none"},
    "no head norm": {"head_norm": "none"},
    "rms head norm": {"head_norm": "rms", "head_norm_affine": "per_head"},
    "half rotary": {"rotary": "half", "head_norm_affine": "shared"},
    "no rotary": {"rotary": "none", "bias": True},
    "partial rotary": {"rotary_dim": 4},
    "parallel": {"mode": "parallel"},
    "chunks of five": {"mode": "chunkwise", "chunk_size": 5},
    "recurrent": {"mode": "recurrent"},
    "convolution": {"conv_width": 4},
    "gated, convolution": {"decay": "gated", "conv_width": 4, "gated_start": "paper"},
    "convolution on q and v": {"conv_width": 2, "conv_on": ("q", "v"), "conv_activation": "none"},
    "wide convolution, shared keys": {"conv_width": 8, "num_kv_heads": 1, "bias": True},
    "q and k normed by weights": {"qk_norm": "rms", "gate": "sigmoid"},
    "lightning attention": {
        "decay": "alibi", "decay_scale": 0.7, "qkv_activation": "silu", "gate": "sigmoid", "head_norm": "rms",
        "head_norm_affine": "per_head", "head_norm_groups": 1, "rotary": "none",
    },
    "q and k of length 1": {"qk_norm": "l2", "conv_width": 3, "conv_on": ("k",), "rotary": "none"},
}  # fmt: skip


def make_model(block: dict | None = None, dtype: str = "float64", **mixer) -> LanguageModel:
    retention = RetentionConfig(**({"num_heads": 2, "key_dim": 16, "value_dim": 24} | mixer))
    layer = BlockConfig(retention, FeedForwardConfig(20, gated=True, activation="swish"), **(block or {}))
    return small_model([layer] * 2, dtype=dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("in_place", [False, True])
def test_prefill_and_decode_from_any_split_equal_one_forward(variant, in_place):
    model, x = make_model(**VARIANTS[variant]), random_ids(2, 17)
    with torch.no_grad():
        whole = model(x).logits
        for bounds in ([0, 17], [0, 1, 2, 16, 17], [0, 8, 13, 17], list(range(18))):
            state, parts = None, []
            for start, end in pairwise(bounds):
                output = model(x[:, start:end], state, carry=True, in_place=in_place)
                state = output.state
                parts.append(output.logits)
            assert (torch.cat(parts, 1) - whole).norm() < 1e-10 * whole.norm()
            assert state.position.tolist() == [17, 17]


def test_a_broken_state_would_be_seen():
    """The test above can fail: dropping the state moves the logits far more than its tolerance."""
    model, x = make_model(), random_ids(1, 10)
    whole, tail = model(x).logits[:, 5:], model(x[:, 5:]).logits
    assert (whole - tail).norm() > 0.1 * whole.norm()


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("variant", ["paper", "gated", "decay norm", "recurrent"])
def test_padding_and_masked_tokens_change_nothing(side, variant):
    model, x = make_model(**VARIANTS[variant]), random_ids(2, 19)
    keep = {"left": [7, 19], "right": [0, 12]}.get(side)
    mask = torch.zeros(2, 19, dtype=torch.bool)
    mask[0] = True
    mask[1] = torch.arange(19) % 3 != 1 if keep is None else False
    if keep:
        mask[1, slice(*keep)] = True
    with torch.no_grad():
        output = model(x, mask=mask, carry=True)
        alone = model(x[1:, mask[1]], carry=True)
        assert (output.logits[1, mask[1]] - alone.logits[0]).norm() < 1e-10 * alone.logits.norm()
        # ... nor for the tokens that follow.
        after = model(random_ids(2, 1, seed=3), output.state, carry=True).logits[1]
        expected = model(random_ids(2, 1, seed=3)[1:], alone.state, carry=True).logits[0]
        assert (after - expected).norm() < 1e-10 * expected.norm()


@pytest.mark.parametrize("variant", ["paper", "gated", "decay norm"])
def test_packed_documents_equal_each_document_alone(variant):
    model, x = make_model(**VARIANTS[variant]), random_ids(1, 30)
    bounds = torch.tensor([0, 9, 9, 20, 30])
    packed = model(x, cu_seqlens=bounds, carry=True)
    for n, (start, end) in enumerate([(0, 9), (9, 9), (9, 20), (20, 30)]):
        alone = model(x[:, start:end], carry=True)
        assert torch.allclose(packed.logits[:, start:end], alone.logits, rtol=1e-10, atol=1e-12)
        for a, b in zip(packed.state, alone.state):
            assert torch.allclose(a.memory[n : n + 1], b.memory, rtol=1e-10, atol=1e-12)
    changed = x.clone()
    changed[0, 19] = (changed[0, 19] + 1) % VOCAB
    again = model(changed, cu_seqlens=bounds).logits
    others = [i for i in range(30) if not 9 <= i < 20]
    assert torch.equal(packed.logits[:, others], again[:, others])
    assert not torch.equal(packed.logits[:, 19], again[:, 19])


def test_packed_states_continue():
    model, x = make_model(), random_ids(1, 30)
    bounds = torch.tensor([0, 12, 30])
    first = model(x[:, :20], cu_seqlens=torch.tensor([0, 12, 20]), carry=True)
    rest = torch.cat([random_ids(1, 4, seed=8), x[:, 20:]], 1)
    second = model(rest, first.state, cu_seqlens=torch.tensor([0, 4, 14]), carry=True)
    expected = model(x, cu_seqlens=bounds).logits[:, 20:]
    assert torch.allclose(second.logits[:, 4:], expected, rtol=1e-10, atol=1e-12)
    assert second.state.position.tolist() == [16, 18]


def test_gradients_of_packed_documents_do_not_leak():
    model, x = make_model(), random_ids(1, 20)
    embeddings = model.embedding(x).detach().requires_grad_()
    hidden, _ = model.hidden(None, embeddings=embeddings, cu_seqlens=torch.tensor([0, 8, 20]))
    hidden[:, 8:].square().sum().backward()
    assert (embeddings.grad[:, :8] == 0).all()
    assert (embeddings.grad[:, 8:] != 0).any()


@pytest.mark.parametrize(
    "block",
    [
        {"norm": "rms"},
        {"norm_position": "post", "skip_scale": (2 * 2) ** 0.25},
        {"residual": "parallel", "residual_scale": 0.7},
        {"norm_position": "shared", "skip_scale": 1.4, "residual_scale": 0.7, "feed_forward_skip_scale": 0.6},
        {"feed_forward_residual_scale": 0.3},
    ],
)
def test_block_variants_decode_like_they_train(block):
    model, x = make_model(block), random_ids(1, 12)
    whole = model(x).logits
    first = model(x[:, :7], carry=True)
    second = model(x[:, 7:], first.state)
    assert torch.allclose(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-9, atol=1e-11)


def test_bfloat16_keeps_positions_and_decays_at_4096():
    """A bfloat16 model is as close to its float32 copy at late tokens as at early ones."""
    exact = make_model(dtype="float32", decay=(1 - 2**-10, 1 - 2**-12))
    narrow = make_model(dtype="float32", decay=(1 - 2**-10, 1 - 2**-12)).bfloat16()
    with torch.no_grad():
        for parameter, rounded in zip(exact.parameters(), narrow.parameters()):
            parameter.copy_(rounded)
        x = random_ids(1, 4096)
        difference = (narrow(x).logits.float() - exact(x).logits).norm(dim=-1) / exact(x).logits.norm(dim=-1)
    early, late = difference[0, 32:256].mean(), difference[0, -256:].mean()
    assert late < 1.5 * early
    assert late < 0.05


def test_half_and_meta_initialisation_keep_the_decay():
    config = make_model().config
    with torch.device("meta"):
        meta = LanguageModel(config)
    restored = meta.to_empty(device="cpu").bfloat16()
    restored.load_state_dict(make_model().bfloat16().state_dict())
    x = torch.zeros(1, 1, 16, dtype=torch.bfloat16)
    decay = restored.layers[0].mixer.log_decay(x)
    assert decay.dtype == torch.float32
    assert torch.equal(decay, make_model().layers[0].mixer.log_decay(x.float()))
    assert torch.equal(restored(random_ids(1, 9)).logits, make_model().bfloat16()(random_ids(1, 9)).logits)


@pytest.mark.parametrize("init", ["paper", "torchscale", "normal"])
@pytest.mark.parametrize(("layers", "width", "heads"), [(32, 256, 16), (2, 1024, 4)])
def test_a_fresh_model_starts_near_uniform(init, layers, width, heads):
    """32 layers of 16 heads are the 6.7b shape at reduced width; at the full width a tied head must not peak either."""
    model = LanguageModel(retnet_config("shape", layers, width, heads, init=init, vocab_size=8192)).eval()
    x = random_ids(1, 128, high=8192)
    with torch.no_grad():
        loss = model.loss(x[:, :-1], x[:, 1:]).item()
    assert abs(loss - math.log(8192)) < 0.2


def test_the_seed_decides_the_weights():
    config = retnet_config("seeded", 2, 16, 2, vocab_size=31)
    torch.manual_seed(1)
    first = LanguageModel(config)
    torch.manual_seed(2)
    second = LanguageModel(config)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_training_learns_to_copy():
    """The loss falls well below the entropy of token frequencies, so gradients reach every part that matters."""
    torch.manual_seed(0)
    model = LanguageModel(retnet_config("copy", 2, 32, 2, vocab_size=16)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        half = torch.randint(0, 16, (16, 8), generator=generator)
        x = torch.cat([half, half], 1)
        labels = torch.full((16, 15), -100)
        labels[:, 7:] = x[:, 8:]
        loss = model.loss(x[:, :-1], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * math.log(16)


def test_logits_are_scaled_before_they_are_capped_and_the_loss_is_theirs():
    plain, ids = small_model(logit_scale=1.0), random_ids(2, 9)
    scaled = small_model(logit_scale=0.25, logit_soft_cap=2.0)
    with torch.no_grad():
        logits = scaled(ids).logits
        torch.testing.assert_close(logits, 2.0 * torch.tanh(plain(ids).logits * 0.25 / 2.0))
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        torch.testing.assert_close(scaled.loss(ids[:, :-1], ids[:, 1:]), expected)
