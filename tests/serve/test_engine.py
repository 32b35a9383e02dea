"""Requests that start and end in any order get exactly the tokens that each gets alone."""

import gc
import random
import weakref

import pytest
import torch

from retnet.layers.attention import AttentionState
from retnet.layers.retention import RetentionState
from retnet.models.decode.sampling import Sampling, mask_words
from retnet.serve.engine import Engine
from retnet.serve.request import Failed, Refused, Request
from retnet.serve.speculation import Speculation
from tests.small_models import HYENA, VOCAB, prompt, small_model

GREEDY = Sampling(temperature=0, logprobs=3)
# For tests of what the engine does with any state: the fixture `any_model`, with every mixer in `make test-all` only.
HYBRID_IS_SLOW = pytest.mark.parametrize(
    "any_model", ["retention", "gated", pytest.param("hybrid", marks=pytest.mark.slow)], indirect=True
)


def text_of(tokens) -> str:
    return "".join(chr(97 + t % 26) for t in tokens)


def engine_of(model, **options) -> Engine:
    return Engine(model, **{"num_slots": 4, "max_tokens": 200, "prompt_chunk": 8, "prompt_budget": 8, **options})


def alone(model, request: Request, **options):
    engine = engine_of(model, **options)
    generation = engine.submit(request)
    engine.run()
    return generation


def facts(generation) -> tuple:
    return generation.tokens, generation.logprobs, generation.finish_reason, generation.text


@pytest.mark.parametrize("length", [1, 2, 9, 10, 41])
def test_greedy_output_is_the_argmax_of_full_forwards(any_model, length):
    ids = prompt(length)
    generation = alone(any_model, Request(ids, 12, GREEDY))
    with torch.no_grad():
        logprobs = any_model(torch.tensor([ids + generation.tokens])).logits[0].log_softmax(-1)
    for i, (token, reported) in enumerate(zip(generation.tokens, generation.logprobs, strict=True)):
        expected = logprobs[length - 1 + i]
        assert token == int(expected.argmax())
        assert reported.logprob == pytest.approx(float(expected.max()), abs=2e-4)
        assert list(reported.top) == expected.topk(3).indices.tolist()


def test_a_request_gives_the_same_bits_whatever_else_is_in_the_batch(any_model):
    request = Request(prompt(21), 15, Sampling(temperature=0.9, seed=7, logprobs=5))
    expected = facts(alone(any_model, request))
    for seed in (1, 3):
        engine, rng = engine_of(any_model), random.Random(seed)
        others = [engine.submit(Request(prompt(rng.randint(1, 30), seed), rng.randint(1, 20))) for _ in range(seed)]
        for _ in range(2 * seed):
            engine.step()
        generation = engine.submit(request)
        others += [engine.submit(Request(prompt(rng.randint(1, 30)), 9, GREEDY)) for _ in range(5)]
        engine.run()
        assert facts(generation) == expected, f"among {seed} earlier requests"
        assert all(other.finished for other in others)


def test_another_number_of_slots_agrees_to_rounding(any_model):
    request = Request(prompt(21), 10, GREEDY)
    one, many = (alone(any_model, request, num_slots=n) for n in (1, 8))
    assert one.tokens == many.tokens
    for a, b in zip(one.logprobs, many.logprobs):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-5)


@pytest.mark.parametrize("speculation", [None, Speculation(3)])
def test_requests_to_mixtures_of_experts_agree_in_any_batch_up_to_rounding(speculation):
    """In float64, where rounding picks no other expert and no other token."""
    model = small_model("experts", dtype="float64")
    request = Request(prompt(21), 15, Sampling(temperature=0.9, seed=7, logprobs=0))
    expected = alone(model, request, num_slots=1)
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt(21) + expected.tokens])).logits[0].log_softmax(-1)
    engine = engine_of(model, speculation=speculation)
    others = [engine.submit(Request(prompt(9 + n, n), 5 + n, Sampling(seed=n))) for n in range(3)]
    engine.step()
    generation = engine.submit(request)
    engine.run()
    assert generation.tokens == expected.tokens
    assert all(other.num_new == other.request.max_new_tokens for other in others)
    for i, (token, reported) in enumerate(zip(generation.tokens, generation.logprobs, strict=True)):
        assert reported.logprob == pytest.approx(float(logprobs[20 + i, token]), abs=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_nothing_of_a_finished_request_reaches_the_next_in_its_slot(any_model, poison):
    request = Request(prompt(11, seed=3), 12, Sampling(temperature=0.7, seed=1, logprobs=2, repetition_penalty=1.3))
    expected = facts(alone(any_model, request, num_slots=1))
    engine = engine_of(any_model, num_slots=1)
    for seed in range(2):
        engine.submit(Request(prompt(20, seed), 9, Sampling(seed=seed, frequency_penalty=0.5, logit_bias={3: 5.0})))
    engine.run()
    for layer in engine.pool.state:
        for name, x in layer.tensors().items():
            if name != "position":
                x.fill_(poison)
    engine.table.bias.fill_(poison)
    engine.table.counts.fill_(7)
    engine.table.seen.fill_(True)
    generation = engine.submit(request)
    engine.run()
    assert facts(generation) == expected


def test_running_requests_get_a_token_per_step_while_a_long_prompt_is_read(small):
    engine = engine_of(small)
    running = engine.submit(Request(prompt(3), 40, GREEDY))
    engine.step()
    late = engine.submit(Request(prompt(80), 5, GREEDY))
    steps = 0
    while not late.tokens:
        assert next(g for g, _ in engine.step()) is running
        steps += 1
    assert steps == 10, "79 tokens before the last, 8 a step; the step that ends them decodes"


def test_prompts_take_turns(small):
    engine = engine_of(small)
    long, short = (engine.submit(Request(prompt(n), 5, GREEDY)) for n in (81, 9))
    while not short.tokens:
        engine.step()
    assert not long.tokens
    engine.run()
    assert facts(long) == facts(alone(small, long.request))


def test_a_request_that_is_cut_ends_as_if_it_had_reached_its_length(small):
    engine = engine_of(small, num_slots=1)
    cut, waiting = [engine.submit(Request(prompt(9), 50, GREEDY, keep_state=True)) for _ in range(2)]
    while cut.num_new < 5:
        engine.step()
    for wrong in (waiting, engine_of(small).submit(Request(prompt(9), 5))):
        with pytest.raises(ValueError, match="accepted: one"):
            engine.cut(wrong)
    engine.cut(cut)
    short = alone(small, Request(prompt(9), 5, GREEDY, keep_state=True), num_slots=1)
    assert facts(cut) == facts(short)
    assert cut.snapshot is not None
    with pytest.raises(ValueError, match="the request is finished"):
        engine.cut(cut)
    rest = engine.submit(Request([], 5, GREEDY), cut.snapshot)
    engine.run()
    assert cut.tokens + rest.tokens == alone(small, Request(prompt(9), 10, GREEDY), num_slots=1).tokens


def test_a_cancelled_request_ends_at_once_and_does_not_affect_others(small):
    expected = facts(alone(small, Request(prompt(5), 20, GREEDY)))
    engine = engine_of(small, max_tokens=None)
    kept = engine.submit(Request(prompt(5), 20, GREEDY))
    others = [engine.submit(Request(prompt(4, seed), None)) for seed in range(3)]
    waiting = engine.submit(Request(prompt(6), 3))
    for _ in range(3):
        engine.step()
    for generation in (*others, waiting):
        engine.cancel(generation)
    reading = engine.submit(Request(prompt(50), 3))
    engine.step()
    engine.cancel(reading)
    assert {g.finish_reason for g in (*others, waiting, reading)} == {"cancelled"}
    assert engine.pool.num_free == 3
    engine.cancel(others[0])
    engine.run()
    assert facts(kept) == expected
    assert engine.pool.num_free == 4


def test_stop_tokens_and_the_end_of_text_end_an_output():
    model = small_model()
    tokens = alone(model, Request(prompt(5), 20, GREEDY)).tokens
    stopped = alone(model, Request(prompt(5), 20, GREEDY, stop_tokens=[tokens[6]]))
    assert stopped.tokens == tokens[: tokens.index(tokens[6]) + 1]
    assert stopped.finish_reason == "stop_token"
    ending = small_model(eos_token_id=tokens[3])
    assert alone(ending, Request(prompt(5), 20, GREEDY)).tokens == tokens[: tokens.index(tokens[3]) + 1]
    assert alone(ending, Request(prompt(5), 20, GREEDY, ignore_eos=True)).tokens == tokens


def test_a_stop_string_ends_an_output_across_token_boundaries(small):
    tokens = alone(small, Request(prompt(5), 20, GREEDY)).tokens
    text = text_of(tokens)
    string = text[9:12]
    stopped = alone(small, Request(prompt(5), 20, GREEDY, stop_strings=[string, "never"]), decode=text_of)
    end = text.index(string)
    assert (stopped.text, stopped.finish_reason) == (text[:end], "stop_string")
    assert stopped.tokens == tokens[: end + 3]
    assert stopped.stops.matched == string


def test_a_stream_yields_tokens_as_they_come_and_is_cancelled_when_closed(small):
    engine = engine_of(small, max_tokens=None)
    expected = alone(small, Request(prompt(5), 20, GREEDY)).tokens
    assert list(engine.stream(Request(prompt(5), 20, GREEDY))) == expected
    stream = engine.stream(Request(prompt(5), None, GREEDY))
    assert [next(stream) for _ in range(20)] == expected
    stream.close()
    assert engine.idle
    assert engine.pool.num_free == 4


def test_a_budget_in_bytes_gives_as_many_slots_as_fit(hybrid):
    cost = engine_of(hybrid).pool.cost
    assert cost.state == sum(layer.slot(0).nbytes for layer in engine_of(hybrid).pool.state)
    assert engine_of(hybrid, num_slots=None, memory_bytes=11 * cost.total).pool.num_slots == 8
    assert engine_of(hybrid, num_slots=None, memory_bytes=3 * cost.total + 1).pool.num_slots == 1
    with pytest.raises(ValueError, match=rf"accepted: at least {cost.total:,} bytes per slot"):
        engine_of(hybrid, num_slots=None, memory_bytes=cost.total - 1)


def test_a_memory_budget_counts_the_draft_updates():
    model, width = small_model("hybrid"), 4
    plain, drafting = (engine_of(model, speculation=s).pool.cost for s in (None, Speculation(width - 1)))
    own = {RetentionState: 2 * (32 + 64), AttentionState: 2 * 2 * 8}  # floats of k and v per token; one rate per head
    rows = [own.get(type(layer), 0) for layer in engine_of(model).pool.state]
    assert drafting.sampling == plain.sampling + 4 * mask_words(VOCAB) * (width - 1)
    assert drafting.state - plain.state > 4 * width * sum(rows)
    with pytest.raises(ValueError, match="at least"):
        engine_of(model, num_slots=None, memory_bytes=plain.total, speculation=Speculation(width - 1))


def test_a_dropped_engine_frees_its_slots_at_once(any_model):
    engine = engine_of(any_model, speculation=Speculation(3))
    generation = engine.submit(Request(prompt(9), 20))
    engine.step()
    pool = weakref.ref(engine.pool)
    gc.disable()
    try:
        del engine
        assert pool() is None
    finally:
        gc.enable()
    assert not generation.finished


def test_the_pool_neither_moves_nor_grows(any_model):
    engine = engine_of(any_model, max_tokens=60)
    places = {(i, n): x.data_ptr() for i, layer in enumerate(engine.pool.state) for n, x in layer.tensors().items()}
    for seed in range(5):
        engine.submit(Request(prompt(45, seed), 12, Sampling(seed=seed)))
    engine.run()
    now = {(i, n): x.data_ptr() for i, layer in enumerate(engine.pool.state) for n, x in layer.tensors().items()}
    assert now == places


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "the prompt is empty"),
        (Request([1, VOCAB]), f"token {VOCAB} is not in the vocabulary"),
        (Request([1], sampling=Sampling(logit_bias={-1: 1.0})), "token -1 is not in the vocabulary"),
        (Request([1], -1), "max_new_tokens is -1"),
        (Request([1] * 100, 101), "100 tokens and max_new_tokens 101 need more room than a slot has"),
        (Request([1], None), "an endless output need more room"),
        (Request([1], 9, stop_strings=["x"]), "stop_strings need text"),
    ],
)
def test_requests_that_can_never_run_are_refused_with_the_reason(hybrid, request_, message):
    with pytest.raises(Refused, match=message):
        engine_of(hybrid).submit(request_)


def test_the_stats_tell_the_queue_from_the_prompts_that_are_read_and_from_decoding(small):
    engine = engine_of(small, num_slots=1)
    running = engine.submit(Request(prompt(20), 5, GREEDY))
    engine.submit(Request(prompt(9), 5, GREEDY))
    stats = engine.stats()
    assert (stats.running, stats.reading, stats.waiting, stats.unread_tokens) == (0, 0, 2, 19 + 8)
    engine.step()
    stats = engine.stats()
    assert (stats.running, stats.reading, stats.waiting, stats.unread_tokens) == (1, 1, 1, 11 + 8)
    assert (stats.prompt_tokens, stats.new_tokens) == (8, 0)
    while not running.tokens:
        engine.step()
    stats = engine.stats()
    assert (stats.running, stats.reading, stats.waiting, stats.unread_tokens) == (1, 0, 1, 8)
    assert (stats.prompt_tokens, stats.new_tokens) == (19, 1)
    engine.run()
    stats = engine.stats()
    assert (stats.running, stats.reading, stats.waiting, stats.unread_tokens, stats.new_tokens) == (0, 0, 0, 0, 10)


@pytest.mark.parametrize("stack", ["retention", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_the_repetition_penalty_counts_the_tokens_that_a_request_names(stack):
    model = small_model(stack)
    ids, never = prompt(12), Sampling(temperature=0, repetition_penalty=1e6)
    for counted in (None, [], ids[:4], [*ids[:4]] * 2, range(40)):
        engine = engine_of(model)
        first = engine.submit(Request(ids, 8, never, counted=counted, keep_state=True))
        engine.run()
        seen, logits = (
            set(ids if counted is None else counted),
            model(torch.tensor([[*ids, *first.tokens]])).logits[0, len(ids) - 1 : -1],
        )
        for token, row in zip(first.tokens, logits.tolist(), strict=True):
            penalised = [z / 1e6 if t in seen and z > 0 else z * 1e6 if t in seen else z for t, z in enumerate(row)]
            assert penalised[token] == pytest.approx(max(penalised), abs=1e-4)
            seen.add(token)
        longer = alone(model, Request(ids, 14, never, counted=counted))
        after = engine.submit(Request([], 6, never, counted=counted), first.snapshot)
        engine.run()
        assert [*first.tokens, *after.tokens] == longer.tokens, "the same output goes on"
    with pytest.raises(Refused, match=f"token {VOCAB} is not in the vocabulary"):
        engine_of(model).submit(Request([1], counted=[VOCAB]))


def test_a_full_queue_refuses_requests_and_reports_the_memory_per_slot(small):
    engine = engine_of(small, num_slots=1, max_waiting=1)
    engine.submit(Request([1], 5))
    engine.step()
    engine.submit(Request([1], 5))
    with pytest.raises(Refused, match=r"all 1 slots are taken and 1 requests wait.*another slot costs [\d,]+ bytes"):
        engine.submit(Request([1], 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 5}, "num_slots is 5; accepted: 1 or a multiple of 4"),
        ({"num_slots": 0}, "num_slots is 0"),
        ({"memory_bytes": 10**6}, "accepted: one of the two"),
        ({"max_tokens": None}, "layer 1 is attention without a window|layer 4 is attention without a window"),
        ({"prompt_chunk": 0}, "prompt_chunk is 0"),
        ({"prefix_interval": 3}, "prefix_interval is 3; accepted: a multiple of prompt_chunk"),
        ({"graphs": True}, "graphs is True for a model on cpu"),
    ],
)
def test_invalid_engine_options_are_refused(hybrid, options, message):
    with pytest.raises(ValueError, match=message):
        engine_of(hybrid, **options)


def test_hyena_is_refused_by_name():
    with pytest.raises(ValueError, match="layer 0 is hyena: the cost of each token grows"):
        Engine(small_model([HYENA]), num_slots=1)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": float("nan")}, {"temperature": 1e39}, {"temperature": 1e-40}, {"temperature": True},
        {"temperature": 10**400},
        {"top_k": 1.5}, {"top_k": 0}, {"presence_penalty": float("nan")}, {"presence_penalty": float("inf")},
        {"frequency_penalty": 1e39}, {"repetition_penalty": 1e-46}, {"logit_bias": {5: float("nan")}},
        {"logit_bias": {5: float("inf")}}, {"logit_bias": {5: 1e39}}, {"logit_bias": {5.5: 1.0}}, {"logit_bias": []},
        {"logprobs": 1.5}, {"seed": 1.5}, {"seed": -1},
    ],
)  # fmt: skip
def test_sampling_options_that_would_make_logits_not_finite_are_refused(options):
    [name] = options
    with pytest.raises(ValueError, match=f"{name} (is|has) .*accepted: "):
        Sampling(**options)


def test_invalid_requests_are_refused_by_name(small):
    for options, name in (
        ({"prompt": "ab"}, "prompt"),
        ({"prompt": [1], "stop_strings": "never"}, "stop_strings"),
        ({"prompt": [1], "max_new_tokens": 1.5}, "max_new_tokens"),
        ({"prompt": [1], "shared": 2}, "shared"),
        ({"prompt": [1], "shared": -1}, "shared"),
    ):
        with pytest.raises(ValueError, match=f"^{name} is .*accepted: "):
            Request(**options)
    engine = engine_of(small)
    for prompt_, sampling in (
        ([1.5], Sampling()),
        (["a"], Sampling()),
        ([2**40], Sampling()),
        ([1], Sampling(logit_bias=dict.fromkeys(range(VOCAB), -float("inf")))),
    ):
        with pytest.raises(Refused, match="accepted: "):
            engine.submit(Request(prompt_, 5, sampling))
    assert engine.idle
    assert alone(small, Request([1], 5, Sampling(top_k=2**70, temperature=0))).finish_reason == "length"


def test_a_decode_function_that_fails_or_cancels_does_not_affect_other_requests(small):
    expected = alone(small, Request(prompt(5, 2), 12, GREEDY)).tokens
    calls = []

    def decode(tokens):
        calls.append(tokens)
        if len(calls) == 4:
            raise UnicodeError("a hiccup")
        if len(calls) > 4:
            engine.cancel(bystander)
        return "".join(chr(97 + t % 26) for t in tokens)

    engine = engine_of(small, decode=decode)
    failing = engine.submit(Request(prompt(4), 12, GREEDY, stop_strings=["zzzz"]))
    cancelling = engine.submit(Request(prompt(4, 1), 12, GREEDY, stop_strings=["zzzz"]))
    bystander = engine.submit(Request(prompt(4, 3), 12, GREEDY))
    other = engine.submit(Request(prompt(5, 2), 12, GREEDY))
    engine.run()
    assert {failing.finish_reason, cancelling.finish_reason} == {"failed", "length"}
    assert "a hiccup" in (failing.error or cancelling.error)
    assert bystander.finish_reason == "cancelled"
    assert other.tokens == expected
    assert engine.pool.num_free == engine.pool.num_slots


def test_streams_side_by_side_have_all_their_tokens(small):
    engine = engine_of(small)
    requests = Request(prompt(5), 8, GREEDY), Request(prompt(6, 2), 12, GREEDY)
    streams, got = [engine.stream(request) for request in requests], ([], [])
    for pair in zip(*streams):
        for tokens, token in zip(got, pair):
            tokens.append(token)
    for tokens, stream in zip(got, streams):
        tokens += stream
    # zip() asks the first iterator once more than the second when the first ends.
    assert [*got] == [alone(small, request).tokens for request in requests]
    with pytest.raises(Refused):
        engine.stream(Request([], 5))


def test_a_failed_stream_raises_an_error():
    model = small_model()
    with torch.no_grad():
        model.layers[0].mixer.q_proj.weight[0, 0] = float("nan")
    with pytest.raises(Failed, match="not finite"):
        list(engine_of(model).stream(Request([1, 2, 3], 20, GREEDY)))


def test_requests_of_another_engine_are_refused(small):
    mine, theirs = engine_of(small), engine_of(small)
    a, b = mine.submit(Request(prompt(5), 9, GREEDY)), theirs.submit(Request(prompt(7, 3), 9, GREEDY))
    mine.step()
    theirs.step()
    for refused in (theirs.cancel, theirs.snapshot):
        with pytest.raises(ValueError, match="another engine"):
            refused(a)
    mine.run()
    theirs.run()
    assert [a.finish_reason, b.finish_reason] == ["length", "length"]
