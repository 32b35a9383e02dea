"""StateCache: the operations of transformers' caches, on states."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from retnet.models.hf import StateCache
from retnet.models.states import ModelState

from .conftest import random_ids


@pytest.fixture
def unequal(model):
    """Three histories of 8, 3 and 5 tokens in one cache, and the rows themselves."""
    rows = [random_ids(1, length)[0] for length in (8, 3, 5)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True, padding_side="left")
    with torch.no_grad():
        return model(padded, attention_mask=mask, use_cache=True).past_key_values, rows


def check_continuations(model, cache, histories):
    """After any operation on the cache, each sequence continues from its own history."""
    next_tokens = random_ids(len(histories), 4)
    with torch.no_grad():
        logits = model(next_tokens, past_key_values=cache).logits
        for row, history in enumerate(histories):
            alone = model(torch.cat([history, next_tokens[row]])[None]).logits[0, len(history) :]
            torch.testing.assert_close(logits[row], alone, rtol=1e-4, atol=1e-4)


def test_beams_of_unequal_history_are_reordered(model, unequal):
    cache, rows = unequal
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert cache.state.position.tolist() == [5, 8, 8]
    check_continuations(model, cache, [rows[2], rows[0], rows[0]])


def test_sequences_are_selected_and_repeated(model, unequal):
    cache, rows = unequal
    cache.batch_select_indices(torch.tensor([1, 2]))
    cache.batch_repeat_interleave(2)
    assert (cache.batch_size, len(cache)) == (4, len(model.model.layers))
    check_continuations(model, cache, [rows[1], rows[1], rows[2], rows[2]])


def test_length_counts_pads_and_position_does_not(unequal):
    cache, _ = unequal
    assert cache.get_seq_length() == 8
    assert cache.state.position.tolist() == [8, 3, 5]
    assert repr(cache).startswith("StateCache(batch_size=3, tokens=8")


def test_a_reset_cache_is_empty(model, unequal):
    cache, _ = unequal
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (0, -1, False)
    check_continuations(model, cache, [torch.empty(0, dtype=torch.long)] * 3)


def test_a_saved_state_starts_a_cache(model, tmp_path):
    ids = random_ids(1, 9)
    with torch.no_grad():
        model(ids, use_cache=True).past_key_values.state.save(tmp_path / "state.safetensors")
    cache = StateCache(ModelState.load(tmp_path / "state.safetensors"))
    assert cache.get_seq_length() == 9
    check_continuations(model, cache, [ids[0]])


def test_removing_tokens_from_a_cache_is_refused(unequal):
    cache, _ = unequal
    cache.crop(0)
    with pytest.raises(ValueError, match="tokens_to_remove is -1; accepted: 0"):
        cache.crop(-1)


def test_reading_without_use_cache_leaves_the_given_cache_alone(model, unequal):
    cache, rows = unequal
    with torch.no_grad():
        output = model(random_ids(3, 2), past_key_values=cache, use_cache=False)
    assert output.past_key_values is None
    check_continuations(model, cache, rows)


def test_another_cache_is_refused(model):
    with pytest.raises(ValueError, match=r"past_key_values is a DynamicCache; accepted: retnet\.hf\.StateCache"):
        model(random_ids(1, 3), past_key_values=DynamicCache())


def test_gradients_flow_through_a_cache(model):
    ids = random_ids(1, 6)
    cache = model(ids[:, :4], use_cache=True).past_key_values
    model(ids[:, 4:], past_key_values=cache).logits.sum().backward()
    split = model.model.embedding.weight.grad.clone()
    model.zero_grad()
    model(ids).logits[:, 4:].sum().backward()
    torch.testing.assert_close(split, model.model.embedding.weight.grad, rtol=1e-3, atol=1e-3)
