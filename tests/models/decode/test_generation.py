"""The plain generation loop: reproducible, equal to full forwards, with flat memory, sampling as the engine does."""

import pytest
import torch

from retnet import LanguageModel
from retnet.models.decode.generation import generate, prefill
from retnet.models.decode.sampling import Sampling
from retnet.models.presets import retnet_config
from retnet.serve.engine import Engine
from retnet.serve.request import Request
from tests.small_models import prompt, random_ids, small_model


@pytest.fixture(scope="module", params=["float32", "float64"], ids=["fused", "modules"])
def model(request):
    return small_model(dtype=request.param)


def test_generation_is_reproducible_and_leaves_the_given_state_alone(model):
    _, state = prefill(model, random_ids(1, 7))
    kept = state.clone()

    def run():
        generator = torch.Generator().manual_seed(5)
        options = {"state": state, "top_k": 5, "top_p": 0.9, "generator": generator}
        return [int(token) for token in generate(model, random_ids(1, 3), 20, **options)]

    assert run() == run()
    assert all(torch.equal(a.memory, b.memory) for a, b in zip(state, kept))


def test_greedy_generation_is_the_argmax_of_full_forwards(model):
    x = random_ids(2, 6)
    tokens = torch.stack(list(generate(model, x, 12, temperature=0)), 1)
    for i in range(12):
        with torch.no_grad():
            expected = model(torch.cat([x, tokens[:, :i]], 1)).logits[:, -1].argmax(-1)
        assert torch.equal(tokens[:, i], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": -1.0}, "temperature is -1"), ({"top_k": 0}, "top_k is 0"), ({"top_p": 0.0}, "top_p is 0")],
)
def test_sampling_options_out_of_range_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        next(generate(model, random_ids(1, 3), 1, **options))


@pytest.mark.parametrize(
    ("tokens", "most"),
    [
        (4000, 2048),
        pytest.param(10_000, 4096, marks=pytest.mark.slow),
        pytest.param(100_000, 4096, marks=pytest.mark.slow),
    ],
)
def test_a_long_generation_keeps_its_memory_flat(tokens, most):
    """most: KiB more after the first tenth of the tokens."""
    import resource

    model = LanguageModel(retnet_config("long", 1, 16, 1, vocab_size=19)).eval()
    stream = generate(model, random_ids(1, 3, high=19), tokens, temperature=0)
    for _ in range(tokens // 10):
        next(stream)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in stream) == tokens - tokens // 10
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < most, f"{grown} KiB more"


CUT = ({"temperature": 0.7, "top_k": 7}, {"top_p": 0.8, "min_p": 0.05})


@pytest.mark.parametrize(
    ("stack", "options"),
    [
        *(("retention", options) for options in ({}, *CUT)),
        ("convolution", {}),
        ("hybrid", {}),
        *(
            pytest.param(stack, options, marks=pytest.mark.slow)
            for stack in ("convolution", "hybrid")
            for options in CUT
        ),
    ],
    ids=str,
)
def test_the_same_seed_gives_the_tokens_of_the_engine(stack, options):
    model = small_model(stack)
    seed = int(torch.randint(2**63 - 1, (1,), generator=torch.Generator().manual_seed(4)))
    engine = Engine(model, num_slots=1, max_tokens=100)
    expected = engine.submit(Request(prompt(9), 20, Sampling(seed=seed, **options)))
    engine.run()
    generator = torch.Generator().manual_seed(4)
    tokens = generate(model, torch.tensor([prompt(9)]), 20, generator=generator, **options)
    assert [int(token) for token in tokens] == expected.tokens


def test_rows_of_a_batch_are_sampled_with_seeds_of_their_own(model):
    rows = torch.stack(list(generate(model, random_ids(1, 3).expand(4, 3), 20)), 1)
    assert len({tuple(row) for row in rows.tolist()}) == 4


def test_a_model_in_training_mode_generates_with_its_modules():
    model = small_model().train()
    places = [weight.data_ptr() for weight in model.parameters()]
    list(generate(model, torch.tensor([prompt(5)]), 3))
    assert [weight.data_ptr() for weight in model.parameters()] == places


def test_a_request_for_no_tokens_reads_no_prompt(model):
    assert list(generate(model, random_ids(1, 3), 0)) == []
