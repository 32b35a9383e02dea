"""Sampling in tables: each row has the distribution of its own options, whatever the other rows' options are."""

import pytest
import torch

from retnet.models.decode.sampling import Sampling, SamplingParts, SamplingTable, uniform

P = torch.tensor([0.4, 0.25, 0.15, 0.12, 0.08])
ALL = SamplingParts(True, True, True, True)


def shares(sampling: Sampling, *, draws: int = 4000, parts: SamplingParts = ALL, seen=(), generated=()) -> torch.Tensor:
    """The frequency of each sampled token, over many positions."""
    table = SamplingTable(1, 5, torch.device("cpu"))
    ids = torch.tensor(list(generated), dtype=torch.long)
    table.fill(0, sampling, 11, torch.tensor([*seen, *generated], dtype=torch.long), ids)
    wide = SamplingTable(draws, 5, torch.device("cpu"))
    for name, x in vars(table).items():
        if isinstance(x, torch.Tensor) and len(x) == 1:  # a row per slot
            setattr(wide, name, x.expand(draws, *x.shape[1:]).clone())
    tokens = wide.sample(P.log().expand(draws, 5), torch.arange(draws), parts).tokens
    return torch.bincount(tokens, minlength=5) / draws


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), P),
        (Sampling(temperature=0), [1, 0, 0, 0, 0]),
        (Sampling(temperature=0.5), P**2),
        (Sampling(top_k=2), [0.4, 0.25, 0, 0, 0]),
        (Sampling(top_k=100), P),
        (Sampling(top_p=0.64), [0.4, 0.25, 0, 0, 0]),
        (Sampling(top_p=0.66), [0.4, 0.25, 0.15, 0, 0]),
        (Sampling(top_p=1.0), P),
        (Sampling(top_p=1e-9), [1, 0, 0, 0, 0]),
        (Sampling(min_p=0.35), [0.4, 0.25, 0.15, 0, 0]),
        (Sampling(min_p=1.0), [1, 0, 0, 0, 0]),
        (Sampling(top_k=3, top_p=0.7), [0.4, 0.25, 0, 0, 0]),
        (Sampling(logit_bias={4: 100.0}), [0, 0, 0, 0, 1]),
        (Sampling(logit_bias={0: -1e9}), [0, 0.25, 0.15, 0.12, 0.08]),
    ],
)
def test_shares_are_those_of_the_truncated_distribution(sampling, expected):
    expected = torch.as_tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(shares(sampling), expected / expected.sum(), atol=0.03, rtol=0)


def test_penalties_act_on_what_was_seen_and_generated():
    raw = P.log()
    seen, generated = [0, 2], [1, 1, 3]
    repeated = raw.clone()
    repeated[[0, 1, 2, 3]] *= 2
    present = raw - torch.tensor([0, 1.0, 0, 1.0, 0])
    frequent = raw - 0.5 * torch.tensor([0, 2, 0, 1, 0])
    for sampling, logits in (
        (Sampling(repetition_penalty=2.0), repeated),
        (Sampling(presence_penalty=1.0), present),
        (Sampling(frequency_penalty=0.5), frequent),
    ):
        found = shares(sampling, seen=seen, generated=generated)
        torch.testing.assert_close(found, logits.softmax(-1), atol=0.03, rtol=0)


def test_recorded_tokens_count_where_they_were_written():
    table = SamplingTable(3, 5, torch.device("cpu"))
    for written in ([True, False, True], [True, True, False]):
        table.record(torch.tensor([1, 2, 3]), torch.tensor(written))
    assert table.counts.tolist() == [[0, 2, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0]]
    assert torch.equal(table.seen, table.counts > 0)


def test_a_row_does_not_depend_on_the_others_or_on_parts_that_it_does_not_use():
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    table = SamplingTable(8, 50, torch.device("cpu"))
    none = torch.zeros(0, dtype=torch.long)
    for row in range(8):
        table.fill(row, Sampling(temperature=0.8), row, none, none)
    position = torch.arange(8) * 100
    plain = table.sample(logits, position, SamplingParts(draws=True)).tokens
    assert torch.equal(table.sample(logits, position, ALL).tokens, plain)
    table.fill(0, Sampling(logit_bias={4: 50.0}, presence_penalty=2.0), 0, none, none)
    table.fill(0, Sampling(temperature=0.8), 0, none, none)
    for row in range(1, 8):
        table.fill(row, Sampling(top_k=2, presence_penalty=3.0, seed=9), 9, none, torch.tensor([row]))
    assert (
        table.sample(logits.roll(1, 1).index_copy(0, torch.tensor([0]), logits[:1]), position, ALL).tokens[0]
        == plain[0]
    )


def test_logprobs_are_those_of_the_model_before_any_option():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    table = SamplingTable(1, 50, torch.device("cpu"))
    none = torch.zeros(0, dtype=torch.long)
    table.fill(0, Sampling(temperature=0.3, top_k=3, logit_bias={7: 50.0}), 0, none, none)
    sampled = table.sample(logits, torch.zeros(1, dtype=torch.long), ALL)
    expected = logits.log_softmax(-1)[0]
    assert sampled.tokens.tolist() == [7]
    assert sampled.logprobs[0] == expected[7]
    assert torch.equal(sampled.top_logprobs[0], expected.topk(20).values)


def test_random_numbers_are_uniform_and_independent_of_seed_and_position():
    seeds, positions = torch.arange(200)[:, None], torch.arange(200)[None]
    u = uniform(seeds, positions)
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    counts = torch.histc(u.float(), 20, 0, 1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 43.8, "chi-square, 19 degrees of freedom, p = 0.001"
    for a, b in ((u[:-1], u[1:]), (u[:, :-1], u[:, 1:])):
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.02
    assert torch.equal(uniform(seeds[3], positions[0]), u[3]), "a function of seed and position alone"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"logprobs": 21}, "logprobs is 21; accepted: None, or an integer of 0 to 20"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_a_bias_for_every_token_is_set_by_a_few_operators():
    vocab_size = 50_000
    bias = {token: float(token % 7) for token in range(vocab_size)}
    table, none = SamplingTable(2, vocab_size, torch.device("cpu")), torch.zeros(1, dtype=torch.long)
    with torch.profiler.profile() as profile:
        table.fill(1, Sampling(logit_bias=bias), 0, none, none)
    assert table.bias[1].tolist() == list(bias.values())
    assert not table.bias[0].any()
    assert sum(event.count for event in profile.key_averages()) < 500
