"""States as values: selected, repeated, copied, stored."""

import pytest
import torch

from retnet import LanguageModel
from retnet.models.decode.generation import generate, prefill, sample
from retnet.models.log_likelihood import score
from retnet.models.presets import retnet_config
from retnet.models.states import ModelState


@pytest.fixture(scope="module")
def model():
    return LanguageModel(retnet_config("states", 2, 32, 2, vocab_size=19)).double().eval()


def ids(B, T, seed=0):
    return torch.randint(0, 19, (B, T), generator=torch.Generator().manual_seed(seed))


def test_select_and_repeat_pick_sequences(model):
    _, state = prefill(model, ids(3, 7))
    picked = state.select(torch.tensor([2, 0, 2]))
    again = model(ids(3, 1, seed=1)[[2, 0, 2]], picked).logits
    expected = model(ids(3, 1, seed=1), state).logits[[2, 0, 2]]
    assert torch.equal(again, expected)
    assert state.repeat(2).position.tolist() == [7] * 6
    assert torch.equal(state.repeat(2).layers[0].memory[1], state.layers[0].memory[0])


def test_a_clone_is_a_checkpoint_to_roll_back_to(model):
    _, state = prefill(model, ids(1, 7))
    kept = state.clone()
    with torch.no_grad():
        expected = model(ids(1, 1, seed=1), kept.clone(), carry=True).logits
        for seed in range(5):
            state = model(ids(1, 1, seed=seed), state, carry=True, in_place=True).state
        assert state.position.tolist() == [12]
        assert kept.position.tolist() == [7]
        assert torch.equal(model(ids(1, 1, seed=1), kept).logits, expected)


def test_saved_states_continue_the_same_text(model, tmp_path):
    _, state = prefill(model, ids(2, 7))
    state.save(tmp_path / "state.safetensors")
    loaded = ModelState.load(tmp_path / "state.safetensors")
    assert loaded.nbytes == state.nbytes
    assert torch.equal(model(ids(2, 3), loaded).logits, model(ids(2, 3), state).logits)


def test_a_damaged_or_foreign_file_is_refused(model, tmp_path):
    _, state = prefill(model, ids(1, 7))
    path = tmp_path / "state.safetensors"
    state.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        ModelState.load(path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a saved retnet state"):
        ModelState.load(path)


def test_generation_is_reproducible_and_leaves_the_given_state_alone(model):
    _, state = prefill(model, ids(1, 7))
    kept = state.clone()

    def run():
        generator = torch.Generator().manual_seed(5)
        return [int(t) for t in generate(model, ids(1, 3), 20, state=state, top_k=5, top_p=0.9, generator=generator)]

    assert run() == run()
    assert all(torch.equal(a.memory, b.memory) for a, b in zip(state, kept))


def test_greedy_generation_is_the_argmax_of_full_forwards(model):
    x = ids(2, 6)
    tokens = torch.stack(list(generate(model, x, 12, temperature=0)), 1)
    for i in range(12):
        with torch.no_grad():
            expected = model(torch.cat([x, tokens[:, :i]], 1)).logits[:, -1].argmax(-1)
        assert torch.equal(tokens[:, i], expected)


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log().expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)
    share = torch.bincount(sample(logits, generator=generator), minlength=4) / 20_000
    assert torch.allclose(share, torch.tensor([0.5, 0.25, 0.15, 0.1]), atol=0.02)
    nucleus = torch.bincount(sample(logits, top_p=0.7, generator=generator), minlength=4) / 20_000
    assert torch.allclose(nucleus, torch.tensor([2 / 3, 1 / 3, 0, 0]), atol=0.02)
    assert (torch.bincount(sample(logits, top_k=1, generator=generator), minlength=4)[1:] == 0).all()


def test_scoring_in_blocks_is_one_context(model, monkeypatch):
    monkeypatch.setattr("retnet.models.log_likelihood.SCORE_BLOCK", 5)
    x = ids(2, 23)
    nats, _ = score(model, x)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            model(x[:, :-1]).logits.float().transpose(1, 2), x[:, 1:], reduction="none"
        )
    assert torch.allclose(nats, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": -1.0}, "temperature is -1"), ({"top_k": 0}, "top_k is 0"), ({"top_p": 0.0}, "top_p is 0")],
)
def test_sampling_options_out_of_range_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        next(generate(model, ids(1, 3), 1, **options))


@pytest.mark.parametrize("tokens", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_long_generation_keeps_its_memory_flat(tokens):
    import resource

    model = LanguageModel(retnet_config("long", 1, 16, 1, vocab_size=19)).eval()
    stream = generate(model, ids(1, 3), tokens, temperature=0)
    for _ in range(tokens // 10):
        next(stream)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in stream) == tokens - tokens // 10
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 4096, f"{grown} KiB more"
