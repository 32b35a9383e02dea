"""States as values: selected, repeated, copied, stored."""

import pytest
import torch

from retnet.models.decode.generation import prefill
from retnet.models.log_likelihood import score
from retnet.models.states import ModelState
from tests.small_models import random_ids, small_model


@pytest.fixture(scope="module")
def model():
    return small_model(dtype="float64")


def test_select_and_repeat_pick_sequences(model):
    _, state = prefill(model, random_ids(3, 7))
    picked = state.select(torch.tensor([2, 0, 2]))
    again = model(random_ids(3, 1, seed=1)[[2, 0, 2]], picked).logits
    expected = model(random_ids(3, 1, seed=1), state).logits[[2, 0, 2]]
    assert torch.equal(again, expected)
    assert state.repeat(2).position.tolist() == [7] * 6
    assert torch.equal(state.repeat(2).layers[0].memory[1], state.layers[0].memory[0])


def test_a_clone_is_a_checkpoint_to_roll_back_to(model):
    _, state = prefill(model, random_ids(1, 7))
    kept = state.clone()
    with torch.no_grad():
        expected = model(random_ids(1, 1, seed=1), kept.clone(), carry=True).logits
        for seed in range(5):
            state = model(random_ids(1, 1, seed=seed), state, carry=True, in_place=True).state
        assert state.position.tolist() == [12]
        assert kept.position.tolist() == [7]
        assert torch.equal(model(random_ids(1, 1, seed=1), kept).logits, expected)


def test_saved_states_continue_the_same_text(model, tmp_path):
    _, state = prefill(model, random_ids(2, 7))
    state.save(tmp_path / "state.safetensors")
    loaded = ModelState.load(tmp_path / "state.safetensors")
    assert loaded.nbytes == state.nbytes
    assert torch.equal(model(random_ids(2, 3), loaded).logits, model(random_ids(2, 3), state).logits)


def test_a_damaged_or_foreign_file_is_refused(model, tmp_path):
    _, state = prefill(model, random_ids(1, 7))
    path = tmp_path / "state.safetensors"
    state.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        ModelState.load(path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a saved retnet state"):
        ModelState.load(path)


def test_scoring_in_blocks_is_one_context(model, monkeypatch):
    monkeypatch.setattr("retnet.models.log_likelihood.SCORE_BLOCK", 5)
    x = random_ids(2, 23)
    nats, _ = score(model, x)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            model(x[:, :-1]).logits.float().transpose(1, 2), x[:, 1:], reduction="none"
        )
    assert torch.allclose(nats, expected, atol=1e-6)
