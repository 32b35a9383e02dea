"""Draft updates: accepting some tokens leaves the state of decoding them one by one."""

import pytest
import torch

from retnet.layers.attention import AttentionConfig
from retnet.layers.block import BlockConfig
from retnet.layers.feed_forward import FeedForwardConfig
from retnet.layers.latent_attention import LatentAttentionConfig
from retnet.layers.mamba1 import Mamba1Config
from retnet.layers.mamba2 import Mamba2Config
from retnet.layers.retention import RetentionConfig
from tests.small_models import random_ids, small_model

MIXERS = {
    "retention": RetentionConfig(2, 12, 24),
    "shared keys": RetentionConfig(2, 12, 24, num_kv_heads=1),
    "gated": RetentionConfig(2, 12, 24, decay="gated"),
    "attention": AttentionConfig(4, 2, head_dim=4),
    "window": AttentionConfig(4, 2, head_dim=4, window=6),
    "latents": LatentAttentionConfig(4, 2, 4, "half", latent_dim=6, rope_dim=2),
    "latents, rotated keys in a window": LatentAttentionConfig(4, 2, 4, "half", latent_dim=6, window=6),
    "mamba1": Mamba1Config(24, time_step_rank=2),
    "mamba2": Mamba2Config(24, head_dim=6, state_dim=4, num_groups=2),
}


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("counts", [[0, 1, 4], [3, 4, 2]])
def test_accepted_tokens_leave_the_state_of_decoding_them_one_by_one(name, counts):
    layer = BlockConfig(MIXERS[name], FeedForwardConfig(16))
    model, ids = small_model([layer] * 2, dtype="float64"), random_ids(3, 15)
    lengths, tokens = torch.tensor([9, 3, 5]), torch.arange(9)
    with torch.no_grad():
        state = model.hidden(ids[:, :9], mask=tokens < lengths[:, None], carry=True)[1]
        state = type(state)(
            tuple(
                x if not hasattr(x, "reserve") else x.reserve(6, getattr(MIXERS[name], "window", None)) for x in state
            )
        )
        kept, draft = state.clone(), ids[:, 9:13]
        hidden, updates = model.draft(draft, state)
        for a, b in zip(state, kept, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a.tensors().values(), b.tensors().values()))
        torch.testing.assert_close(hidden, model.hidden(draft, kept.clone())[0], rtol=1e-10, atol=1e-10)
        updates.accept_(state, torch.tensor(counts))
        expected = kept
        for t in range(4):
            mask = torch.tensor(counts)[:, None] > t
            _, expected = model.hidden(draft[:, t : t + 1], expected, mask=mask, carry=True, in_place=True)
        assert state.position.tolist() == (lengths + torch.tensor(counts)).tolist()
        one = ids[:, 14:]
        torch.testing.assert_close(
            model.hidden(one, state.clone())[0], model.hidden(one, expected.clone())[0], rtol=1e-10, atol=1e-10
        )
        for a, b in zip(state, expected, strict=True):
            for x, y in zip(a.tensors().values(), b.tensors().values()):
                torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
