"""Self-speculation: drafts by multi-token prediction change the speed and not the output, and its states follow it."""

from dataclasses import replace

import pytest
import torch

from retnet.layers.block import BlockConfig
from retnet.models.decode.sampling import Sampling
from retnet.models.snapshot import Snapshot
from retnet.serve.request import Request
from retnet.serve.speculation import Speculation
from tests import small_models
from tests.small_models import CONV, HYENA, MTP, NOPE, PAPER, WINDOW, random_ids, small_model

from .automaton import cycle
from .test_engine import engine_of

GREEDY = Sampling(temperature=0)
SELF = Speculation(3, source="mtp")
WORDS = 6  # so few tokens that guesses of untrained modules are right by chance


def model_of(stack="retention", mtp=MTP, **options):
    """In float64, because a step of several tokens rounds differently from a step of one."""
    return small_model(stack, mtp=mtp, vocab_size=WORDS, **{"dtype": "float64", **options})


def words(length: int, seed: int = 0) -> list[int]:
    return random_ids(length, high=WORDS, seed=seed).tolist()


REQUESTS = [
    Request(words(1 + 5 * n % 21, n), 9 + 3 * n % 10, sampling)
    for n, sampling in enumerate([
        GREEDY, Sampling(temperature=0.7, seed=1), Sampling(temperature=1.0, top_k=3, seed=2), GREEDY,
        Sampling(temperature=0.8, seed=3, frequency_penalty=0.3), Sampling(temperature=0.6, top_p=0.9, seed=4),
    ])
]  # fmt: skip


def check_states(engine) -> None:
    """The states of every running request are those of reading its tokens, but the last, in one piece."""
    model = engine.model
    for slot, generation in engine._stages.decoding.items():
        ids = torch.tensor([generation.seen[:-1].tolist()])
        found = engine.pool.state.slot(slot).trim()
        if ids.numel() == 0:
            continue
        with torch.no_grad():
            hidden, expected = model.hidden(ids, carry=True)
            expected = replace(expected, mtp=model.ahead(hidden, ids, carry=True).states).trim().named_tensors()
        for name, x in found.named_tensors().items():
            torch.testing.assert_close(x, expected[name], rtol=1e-8, atol=1e-8, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    ("stack", "block", "draft_tokens"),
    [("retention", WINDOW, 3), ("gated", NOPE, 7), pytest.param("hybrid", CONV, 7, marks=pytest.mark.slow)],
    ids=["window", "attention", "convolution"],
)
def test_many_streams_get_the_tokens_of_plain_decoding_and_states_follow_accepted_tokens(stack, block, draft_tokens):
    model = model_of(stack, replace(MTP, block=block))
    plain = engine_of(model, prefix_cache_bytes=2**24)
    ours = engine_of(model, prefix_cache_bytes=2**24, speculation=Speculation(draft_tokens, source="mtp"))
    outputs = []
    for engine in (plain, ours):
        generations = [engine.submit(request) for request in REQUESTS]
        while not engine.idle:
            engine.step()
            if engine is ours and engine.stats().steps % 5 == 0:
                check_states(engine)
        outputs.append([generation.tokens for generation in generations])
    assert outputs[1] == outputs[0]
    stats = ours.stats()
    assert stats.drafted > stats.accepted > 5
    assert stats.steps < plain.stats().steps


def test_snapshots_forks_and_cached_prefixes_keep_the_states_of_the_modules(tmp_path):
    model, shared = model_of(), words(40, 9)
    engine = engine_of(model, prefix_cache_bytes=2**24, speculation=SELF, prompt_chunk=16)
    request = Request([*shared, 1], 40, GREEDY)
    whole = engine.submit(request)
    engine.run()
    half = engine.submit(replace(request, max_new_tokens=15, keep_state=True))
    engine.run()
    assert half.cached > 0
    half.snapshot.save(tmp_path / "half.state")
    stored = Snapshot.load(tmp_path / "half.state").state
    for part, kept in zip(stored.mtp, half.snapshot.state.mtp, strict=True):
        for name, x in kept.tensors().items():
            torch.testing.assert_close(part.tensors()[name], x, rtol=1e-6, atol=1e-6)  # stored in float32
    before = engine.stats()
    rest = engine.submit(Request([], 25, GREEDY), half.snapshot)
    engine.step()
    check_states(engine)
    fork = engine.fork(rest, Request([2, 3], 10, GREEDY))
    engine.step()
    check_states(engine)
    engine.run()
    assert half.tokens + rest.tokens == whole.tokens
    assert len(fork.tokens) == 10
    assert engine.stats().accepted > before.accepted


def test_a_snapshot_passes_between_engines_with_and_without_self_speculation():
    """Without states of the modules they begin anew: guesses are worse, tokens are the same."""
    model = model_of()
    outputs = []
    for first, second in ((None, SELF), (SELF, None), (None, None), (Speculation(3), SELF)):
        begun = engine_of(model, speculation=first)
        half = begun.submit(Request(words(20), 12, GREEDY, keep_state=True))
        begun.run()
        engine = engine_of(model, speculation=second)
        rest = engine.submit(Request([], 30, GREEDY), half.snapshot)
        engine.run()
        outputs.append(half.tokens + rest.tokens)
    assert all(output == outputs[0] for output in outputs)


def test_a_draft_is_cut_where_a_grammar_refuses_it_and_stop_tokens_inside_end_the_output():
    model = model_of()
    engine = engine_of(model, speculation=SELF)
    bound = engine.submit(Request(words(9), 12, GREEDY, grammar=cycle([1, 2, 3])))
    free = engine.submit(Request(words(9), 12, GREEDY))
    engine.run()
    assert bound.tokens == [1, 2, 3] * 4
    stop = free.tokens[5]
    stopped = engine.submit(Request(words(9), 12, GREEDY, stop_tokens=[stop]))
    engine.run()
    assert stopped.tokens == free.tokens[: free.tokens.index(stop) + 1]


def test_a_guess_takes_the_token_of_the_model_where_both_distributions_are_equal():
    """A head of zeros gives both the uniform distribution: every sampled draft token is right."""
    model = model_of()
    with torch.no_grad():
        model.head.weight.zero_()
    engine = engine_of(model, speculation=Speculation(7, source="mtp"))
    for seed in range(4):
        engine.submit(Request(words(5, seed), 33, Sampling(temperature=1.0, seed=seed)))
    engine.run()
    stats = engine.stats()
    assert stats.accepted == stats.drafted > 0


def test_a_model_or_engine_without_room_for_the_drafts_is_refused_by_name():
    with pytest.raises(ValueError, match="mtp, which the model does not have; accepted for it: context"):
        engine_of(model_of(mtp=None), speculation=SELF)
    with pytest.raises(ValueError, match="whose block is hyena, which has no drafts; accepted for this model: context"):
        engine_of(model_of(mtp=replace(MTP, block=HYENA)), speculation=SELF)
    with pytest.raises(ValueError, match="attention without a window, whose state grows; accepted: max_tokens"):
        engine_of(model_of(mtp=replace(MTP, block=NOPE)), speculation=SELF, max_tokens=None)
    with pytest.raises(ValueError, match=r"mtp\.block is attention, which keeps 9 tokens; accepted with .* 11"):
        engine_of(model_of(), speculation=Speculation(11, source="mtp"))
    with pytest.raises(ValueError, match="source is 'head'"):
        Speculation(3, source="head")
    with pytest.raises(ValueError, match="drafts is 'model'; accepted: auto, mtp, context"):
        Speculation.of(3, "model", model_of().config)


def test_auto_takes_the_modules_where_the_model_has_them_and_slots_count_their_states():
    model = model_of()
    assert Speculation.of(3, "auto", model.config) == SELF
    assert Speculation.of(3, "auto", replace(model.config, mtp=None)) == Speculation(3)
    assert Speculation.of(0, "mtp", model.config) is None
    ours, plain = (engine_of(model, speculation=s).pool for s in (SELF, None))
    states = sum(part.nbytes for part in ours.state.mtp) // ours.num_slots
    assert ours.cost.state > plain.cost.state + states
    assert ours.cost.index == 0


BLOCKS = {name: block for name, block in vars(small_models).items() if isinstance(block, BlockConfig)}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(BLOCKS.keys() - {"HYENA"}))
def test_modules_of_any_block_draft_for_the_engine(name):
    model = model_of(mtp=replace(MTP, block=BLOCKS[name]))
    outputs = []
    for engine in (engine_of(model), engine_of(model, speculation=SELF)):
        generations = [engine.submit(request) for request in REQUESTS]
        for _ in range(6):
            engine.step()
        if engine.drafter is not None:
            check_states(engine)
        engine.run()
        outputs.append([generation.tokens for generation in generations])
    assert outputs[0] == outputs[1]
    assert engine.stats().accepted > 0


@pytest.mark.slow
def test_a_trained_model_guesses_most_tokens_of_a_repetitive_text():
    """Sentences of a small grammar: the second token ahead follows from the words before it."""
    model = small_model([PAPER] * 2, mtp=replace(MTP, block=PAPER, num_modules=1, loss_weight=0.5), init="paper")
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> list[int]:
        """Sentences of 6 words, each drawn from 4 of its place; the words between follow from the first."""
        tokens = []
        while len(tokens) < length:
            first = int(torch.randint(4, (), generator=generator))
            tokens += [first, *(10 * place + first for place in range(1, 6))]
        return tokens[:length]

    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for _ in range(150):
        ids = torch.tensor([text(65) for _ in range(8)])
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    engine = engine_of(model, speculation=SELF, max_tokens=400)
    plain = engine_of(model, max_tokens=400)
    requests = [Request(text(30), 120, Sampling(temperature=t, seed=7)) for t in (0, 0, 1.0, 1.0)]
    outputs = []
    for each in (engine, plain):
        generations = [each.submit(request) for request in requests]
        each.run()
        outputs.append([generation.tokens for generation in generations])
    assert outputs[0] == outputs[1]
    stats = engine.stats()
    print(f"accepted {stats.accepted} of {stats.drafted}, {stats.steps} steps instead of {plain.stats().steps}")
    assert stats.accepted > 0.5 * stats.drafted
